"""Padded adapters: a secret update under a fresh one-time pad that only the difference of two adapters takes away.

The client keeps one secret update δ of the adapters' weights. For every δ it draws a pad p ~ N(0, σ²) and gives one
operator p + δ / 2s, another p − δ / 2s. Neither tells δ, but

    h(x, 0) + s · (h(x, p + δ/2s) − h(x, p − δ/2s))  =  h(x, 0) + J_p(x) δ + O(σ²) + O(δ²/s²)

with J = ∂h/∂θ: what the pad does to the model cancels, what δ does stays. This is P3EFT's mixing (eq. 3) with the
weights (1, s, −s), which sum to one, over the adapters (0, p + δ/2s, p − δ/2s).

What an operator can learn from it is bounded whatever it computes. One padded adapter is a Gaussian mechanism: its
Kullback-Leibler divergence from an adapter that knows nothing, N(0, σ²), is |δ/2s|² / 2σ². Divergences of consecutive
messages add up (chain rule), whoever chose δ from whatever, so with |δ| ≤ R the mutual information between all labels
together and v padded adapters is at most

    v R² / (8 s² σ²)   nats.

Activations, shifts, differences of consecutive adapters and every probe on them are functions of the adapters and the
texts, so they tell no more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from blindtune.privacy.randomness import SecureGenerator


@dataclass(frozen=True)
class PadScale:
    """Public numbers of a run with padded adapters.

    Attributes:
        sigma: standard deviation of the pads.
        max_norm: R, the largest norm of δ; a longer one is scaled down.
        amplification: s.
    """

    sigma: float
    max_norm: float
    amplification: float

    @property
    def nats(self) -> float:
        """What one padded adapter can tell about all labels together."""
        return (self.max_norm / (2.0 * self.amplification)) ** 2 / (2.0 * self.sigma**2)

    @staticmethod
    def for_budget(sigma: float, max_norm: float, views: int, nats: float) -> PadScale:
        """The smallest amplification with which so many padded adapters stay within the budget.

        Raises:
            ValueError: a number that isn't positive.
        """
        if not all(number > 0 for number in (sigma, max_norm, views, nats)):
            raise ValueError(
                f"sigma = {sigma}, max_norm = {max_norm}, views = {views}, nats = {nats}: must be positive."
            )
        return PadScale(sigma, max_norm, max_norm / sigma * math.sqrt(views / (8.0 * nats)))


def bounded(delta: Tensor, max_norm: float) -> tuple[Tensor, float]:
    """δ `(P,)` in float64, scaled down to `max_norm` if it is longer, and the factor that did it."""
    exact = delta.double()
    factor = min(1.0, max_norm / max(float(exact.norm()), 1e-30))
    return exact * factor, factor


def pad_pair(delta: Tensor, scale: PadScale, *, generator: SecureGenerator) -> tuple[Tensor, Tensor]:
    """`p + δ/2s` and `p − δ/2s` for δ `(P,)` with |δ| ≤ `scale.max_norm`: float32, drawn and added in float64.

    Raises:
        ValueError: δ is longer, or holds NaN or infinity.
    """
    exact = delta.double()
    norm = float(exact.norm())
    if not norm <= scale.max_norm * (1 + 1e-9):
        raise ValueError(f"The update has norm {norm}; the pad is made for {scale.max_norm}.")
    pad = scale.sigma * generator.normal(*exact.shape)
    small = exact / (2.0 * scale.amplification)
    return (pad + small).float(), (pad - small).float()


def unpad(base: Tensor, plus: Tensor, minus: Tensor, scale: PadScale) -> Tensor:
    """h(x, 0) + s (h₊ − h₋) from hidden states of one shape: in float64, returned as float32."""
    difference = plus.double() - minus.double()
    return torch.add(base.double(), difference, alpha=scale.amplification).float()
