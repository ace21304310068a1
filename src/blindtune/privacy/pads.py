"""Padded adapters: a secret update, masked by a fresh one-time pad that cancels in the difference of two adapters.

The client keeps one secret update δ of the adapters' weights. For every δ it draws a pad p ~ N(0, σ²) and sends
p + δ / 2s to one operator and p − δ / 2s to another. Neither reveals δ, but

    h(x, 0) + s · (h(x, p + δ/2s) − h(x, p − δ/2s))  =  h(x, 0) + J_p(x) δ + O(σ²) + O(δ²/s²)

with J = ∂h/∂θ: the pad's effect on the model cancels, the effect of δ remains. This is P3EFT's mixing (eq. 3) with the
weights (1, s, −s), which sum to one, over the adapters (0, p + δ/2s, p − δ/2s).

Both adapters lie on a public lattice (`blindtune.lattice`): δ/2s is rounded to it, stochastically and without bias, and
the pad is discrete Gaussian noise on it, so p ± δ/2s is exact in float32.

What an operator can learn from an adapter is bounded, whatever it computes. One padded adapter is a Gaussian mechanism
that costs |δ/2s|² / σ² (`blindtune.privacy.accountant`) for an update δ. Activations, shifts, differences of
consecutive adapters and all classifiers on them are functions of the adapters and the texts, so they reveal no more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from blindtune.lattice import Lattice
from blindtune.privacy.randomness import SecureGenerator


@dataclass(frozen=True)
class PadScale:
    """Public parameters of a run with padded adapters.

    Attributes:
        lattice: the lattice of the pads; its σ is their standard deviation.
        amplification: s, the factor on the difference of the two adapters' outputs.
    """

    lattice: Lattice
    amplification: float

    @staticmethod
    def for_allowance(sigma: float, norm: float, allowance: float, *, limit: float = 1.0) -> PadScale:
        """Returns the scale with the smallest amplification for which an update of this norm costs at most `allowance`.

        Args:
            sigma: standard deviation of the pads.
            norm: |δ|.
            allowance: |δ/2s|² / σ² of one padded adapter.
            limit: largest cost of one padded adapter that the lattice must be able to represent.
        Raises:
            ValueError: a number isn't positive.
        """
        if not all(number > 0 for number in (sigma, norm, allowance)):
            raise ValueError(f"sigma = {sigma}, norm = {norm}, allowance = {allowance}: must be positive.")
        lattice = Lattice.for_sigma(sigma, largest=sigma * math.sqrt(limit))
        return PadScale(lattice, norm / (2.0 * lattice.sigma * math.sqrt(allowance)))

    def points(self, delta: Tensor, room: float, *, generator: SecureGenerator) -> tuple[Tensor, float]:
        """Returns δ/2s on the lattice, in steps, int64 `(P,)`, and the factor by which it was scaled.

        The update is scaled down until it costs at most `room`. Its values are rounded stochastically, without bias.
        """
        return self.lattice.round_within(delta.double() / (2.0 * self.amplification), room, generator)

    def resolution(self, size: int, allowance: float) -> float:
        """Returns the fraction of an allowance that remains for δ after the cost of rounding its `size` values."""
        return 1.0 - size / 4.0 / (allowance * self.lattice.steps**2)


def pad_pair(points: Tensor, lattice: Lattice, *, generator: SecureGenerator) -> tuple[Tensor, Tensor]:
    """Draws a pad p and returns the exact `p + δ/2s` and `p − δ/2s`, float32.

    Args:
        points: δ/2s on the lattice, in steps (`PadScale.points`).
    Raises:
        LatticeOverflow: the update is far larger than the pad.
    """
    pad = lattice.noise(generator, points.shape)
    return lattice.values(pad + points), lattice.values(pad - points)


def unpad(base: Tensor, plus: Tensor, minus: Tensor, amplification: float) -> Tensor:
    """Returns h(x, 0) + s (h₊ − h₋) for hidden states of equal shapes, computed in float64, as float32."""
    difference = plus.double() - minus.double()
    return torch.add(base.double(), difference, alpha=amplification).float()
