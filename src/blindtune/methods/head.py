"""A linear head on standardised features, and its fit on frozen ones: the usual start of probing, then fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST = 1e3
"""Standardised features beyond this are no model's; the fit must not break off because of an operator's answers."""


class LinearHead(nn.Module):
    """Logits `(B, K)` from features `(B, d)`: standardise with fixed statistics, then a linear layer."""

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, classes)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def forward(self, features: Tensor) -> Tensor:
        return self.linear((features - self.mean) / self.scale)

    def fit(self, features: Tensor, labels: Tensor, *, l2: float = 500.0, iterations: int = 100) -> None:
        """Sets the statistics and fits multinomial logistic regression (L-BFGS) on features `(N, d)`.

        Args:
            l2: strength of the penalty, in units of one example.
        """
        spread = features.std(0)
        self.mean = features.mean(0)
        alive = spread[spread > 0]  # a dead dimension must not explode
        self.scale = spread.clamp_min(0.2 * float(alive.median()) if len(alive) else 1.0)
        x = ((features - self.mean) / self.scale).nan_to_num().clamp(-LARGEST, LARGEST)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        parameters = list(self.linear.parameters())
        optimizer = torch.optim.LBFGS(parameters, max_iter=iterations, line_search_fn="strong_wolfe")

        def objective() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(self.linear(x), labels)
            loss = loss + l2 / (2 * len(labels)) * self.linear.weight.pow(2).sum()
            loss.backward()
            return loss

        optimizer.step(objective)  # pyright: ignore[reportArgumentType]
        optimizer.zero_grad()
