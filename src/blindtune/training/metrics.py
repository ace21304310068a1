"""How good a model is."""

from __future__ import annotations

import torch
from sklearn.metrics import f1_score
from torch import Tensor
from torch.nn import functional as F


def scores(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, macro F1 and mean negative log-likelihood from probabilities `(N, K)` and labels `(N,)`."""
    predicted = probabilities.argmax(-1)
    return {
        "accuracy": float((predicted == labels).float().mean()),
        "f1": float(f1_score(labels.numpy(), predicted.numpy(), average="macro")),
        "loss": float(F.nll_loss(torch.log(probabilities.clamp_min(1e-12)), labels)),
    }
