"""Padded adapters: a secret update under a fresh one-time pad that only the difference of two adapters takes away.

The client keeps one secret update δ of the adapters' weights. For every δ it draws a pad p ~ N(0, σ²) and gives one
operator p + δ / 2s, another p − δ / 2s. Neither tells δ, but

    h(x, 0) + s · (h(x, p + δ/2s) − h(x, p − δ/2s))  =  h(x, 0) + J_p(x) δ + O(σ²) + O(δ²/s²)

with J = ∂h/∂θ: what the pad does to the model cancels, what δ does stays. This is P3EFT's mixing (eq. 3) with the
weights (1, s, −s), which sum to one, over the adapters (0, p + δ/2s, p − δ/2s).

Both halves lie on a public lattice (`blindtune.lattice`): δ/2s is rounded to it, at random and without bias, and the
pad is discrete Gaussian noise on it, so p ± δ/2s is exact in float32.

What an operator can learn from it is bounded whatever it computes. One padded adapter is a Gaussian mechanism that
tells |δ/2s|² / σ² (in the units of `blindtune.privacy.accountant`) of an update δ. Activations, shifts, differences of
consecutive adapters and every probe on them are functions of the adapters and the texts, so they tell no more.
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
    """Public numbers of a run with padded adapters.

    Attributes:
        lattice: of the pads; its σ is their standard deviation.
        amplification: s.
    """

    lattice: Lattice
    amplification: float

    @staticmethod
    def for_allowance(sigma: float, norm: float, allowance: float, *, limit: float = 1.0) -> PadScale:
        """The smallest amplification with which an update of this norm costs no more than the allowance.

        Args:
            sigma: standard deviation of the pads.
            norm: |δ|.
            allowance: |δ/2s|² / σ² of one padded adapter.
            limit: most that one padded adapter may ever cost.
        Raises:
            ValueError: a number that isn't positive.
        """
        if not all(number > 0 for number in (sigma, norm, allowance)):
            raise ValueError(f"sigma = {sigma}, norm = {norm}, allowance = {allowance}: must be positive.")
        lattice = Lattice.for_sigma(sigma, largest=sigma * math.sqrt(limit))
        return PadScale(lattice, norm / (2.0 * lattice.sigma * math.sqrt(allowance)))

    def points(self, delta: Tensor, room: float, *, generator: SecureGenerator) -> tuple[Tensor, float]:
        """δ/2s on the lattice, in steps, int64 `(P,)`, and the factor by which it was shrunk to cost at most `room`.

        Values are rounded at random, without bias.
        """
        return self.lattice.round_within(delta.double() / (2.0 * self.amplification), room, generator)

    def resolution(self, size: int, allowance: float) -> float:
        """The part of an allowance that is left for δ itself, of so many values, once rounding has had its part."""
        return 1.0 - size / 4.0 / (allowance * self.lattice.steps**2)


def pad_pair(points: Tensor, lattice: Lattice, *, generator: SecureGenerator) -> tuple[Tensor, Tensor]:
    """`p + δ/2s` and `p − δ/2s` in float32, exact, from δ/2s on the lattice (`PadScale.points`).

    Raises:
        LatticeOverflow: the update is far larger than the pad.
    """
    pad = lattice.noise(generator, points.shape)
    return lattice.values(pad + points), lattice.values(pad - points)


def unpad(base: Tensor, plus: Tensor, minus: Tensor, amplification: float) -> Tensor:
    """h(x, 0) + s (h₊ − h₋) from hidden states of one shape: in float64, returned as float32."""
    difference = plus.double() - minus.double()
    return torch.add(base.double(), difference, alpha=amplification).float()
