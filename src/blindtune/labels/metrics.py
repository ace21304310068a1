"""Metrics of a classifier."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def scores(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Returns `accuracy`, macro `f1` and mean negative log-likelihood `loss`, in nats.

    Args:
        probabilities: `(N, K)`.
        labels: `(N,)`, class indices.
    """
    predicted = probabilities.argmax(-1)
    return {
        "accuracy": float((predicted == labels).float().mean()),
        "f1": macro_f1(predicted, labels),
        "loss": float(F.nll_loss(torch.log(probabilities.clamp_min(1e-12)), labels)),
    }


def macro_f1(predicted: Tensor, labels: Tensor) -> float:
    """Returns the mean over classes of F1 = 2 TP / (2 TP + FP + FN), as scikit-learn computes it.

    Args:
        predicted, labels: `(N,)`, class indices. Classes that occur in neither are left out of the mean.
    """
    classes = torch.cat([predicted, labels]).unique()
    hits = torch.stack([((predicted == c) & (labels == c)).sum() for c in classes])
    sizes = torch.stack([(predicted == c).sum() + (labels == c).sum() for c in classes])  # 2 TP + FP + FN
    return float((2.0 * hits / sizes).mean())
