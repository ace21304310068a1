"""Heads: local modules from features `(B, d)` to logits `(B, K)`.

A linear head is fitted on frozen features first and then fine-tuned with the adapters, which is the usual order of
linear probing, then fine-tuning. The others are those of P3EFT's authors, and start from random weights.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blindtune.errors import ConfigError

LARGEST = 1e3
"""Bound on the absolute value of standardised features in the fit.

No model gives larger ones. With the bound, an operator's responses can't make the fit fail.
"""


class LinearHead(nn.Module):
    """Computes logits `(B, K)` from features `(B, d)`: it standardises them with fixed statistics, then applies a
    linear layer."""

    mean: Tensor
    """Mean of the features, `(d,)`."""
    scale: Tensor
    """Standard deviation of the features, `(d,)`, with a lower bound."""

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
            l2: weight of the penalty |W|² / 2 on the weights, relative to the loss of one example.
        """
        deviation = features.std(0)
        self.mean = features.mean(0)
        varying = deviation[deviation > 0]  # dividing by the deviation of a constant dimension would give infinity
        self.scale = deviation.clamp_min(0.2 * float(varying.median()) if len(varying) else 1.0)
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


class MLPHead(nn.Sequential):
    """Computes logits `(B, K)` from features `(B, d)`: a pooler, then hidden layers of 128 and 32 units (ReLU).

    It is the head of P3EFT's code of 2023, with random initial weights. The pooler is DeBERTa's: a linear layer from d
    to d, then GELU.
    """

    def __init__(self, dim: int, classes: int) -> None:
        hidden = (nn.Linear(dim, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU())
        super().__init__(nn.Linear(dim, dim), nn.GELU(), *hidden, nn.Linear(32, classes))


class PoolerHead(nn.Sequential):
    """Computes logits `(B, K)` from features `(B, d)`: a pooler, then a linear layer.

    It is the head of P3EFT's code of 2025 for DeBERTa, with random initial weights.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, classes))


HEADS: dict[str, Callable[[int, int], nn.Module]] = {"linear": LinearHead, "mlp": MLPHead, "pooler": PoolerHead}
"""Classes of heads, by name. Each takes d and K."""


def make_head(name: str, dim: int, classes: int, *, seed: int | None = None) -> nn.Module:
    """Creates the head with this name.

    Args:
        dim: d, the dimension of features.
        classes: K, the number of classes.
        seed: seed of the initial weights. Default: a random, secret one.
    Raises:
        ConfigError: no head has this name.
    """
    if name not in HEADS:
        raise ConfigError(f"There is no head {name!r}.", remedy=f"Use one of: {', '.join(HEADS)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(secrets.randbits(63) if seed is None else seed)
        return HEADS[name](dim, classes)
