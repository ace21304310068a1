"""Losses of the logits `(B, K)` and class indices `(B,)`, as means over the batch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]
"""`(logits (B, K), labels (B,)) -> scalar`, a mean over the batch."""


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Computes ½ Σₖ (logitₖ − tₖ)² with tₖ = 1 for the example's class and −1 for others, as a mean over the batch.

    For a model that is linear in its weights, such as padded LoRA's, it is better conditioned than cross entropy
    (Achille et al. 2020, *LQF: Linear Quadratic Fine-Tuning*).
    """
    targets = 2.0 * F.one_hot(labels, logits.shape[-1]).to(logits) - 1.0
    return (logits - targets).square().sum(-1).mean() / 2


LOSSES: dict[str, Loss] = {"cross_entropy": F.cross_entropy, "squared": squared_error}
"""Losses by name."""
