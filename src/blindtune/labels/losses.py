"""Losses of the logits `(B, K)` and class indices `(B,)`, as means over the batch."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from blindtune.errors import ConfigError

Loss = Callable[[Tensor, Tensor], Tensor]
"""`(logits (B, K), labels (B,)) -> scalar`, a mean over the batch."""
SURE = 0.95
"""Probability of the right class at the least squared error."""


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Computes ½ Σₖ (logitₖ / T − tₖ)², a mean over the batch, with tₖ = 1 for the example's class and −1 for others.

    T is such that the softmax of the targets T t gives the right class a probability of `SURE`. For a model that is
    linear in its weights, such as padded LoRA's, the squared error is better conditioned than cross entropy
    (Achille et al. 2020, *LQF: Linear Quadratic Fine-Tuning*).
    """
    classes = logits.shape[-1]
    size = 0.5 * math.log(max(1, classes - 1) * SURE / (1 - SURE))
    targets = 2.0 * F.one_hot(labels, classes).to(logits) - 1.0
    return (logits / size - targets).square().sum(-1).mean() / 2


LOSSES: dict[str, Loss] = {"cross_entropy": F.cross_entropy, "squared": squared_error}
"""Losses by name."""
OWN = "own"
"""Name of a loss that isn't in `LOSSES`."""


def find_loss(name: str) -> Loss:
    """Returns the loss with this name.

    Raises:
        ConfigError: no loss has this name.
    """
    if name not in LOSSES:
        raise ConfigError(f"There is no loss {name!r}.", remedy=f"Use one of: {', '.join(LOSSES)}.")
    return LOSSES[name]


def loss_name(loss: Loss) -> str:
    """Returns the name of a loss; `OWN` if it isn't in `LOSSES`."""
    return next((name for name, known in LOSSES.items() if known is loss), OWN)
