"""Gradient shares: m noise-like tensors whose sum is exactly the gradient (P3EFT, Algorithm 1).

Backpropagation is linear in its cotangent, so backprop(g) = Σ_j backprop(ĝ_j) whenever g = Σ_j ĝ_j. All shares lie on a
public lattice (`blindtune.lattice`): m − 1 of them are discrete Gaussian noise, and the last one, the carrier, is g
minus the sum of the others. An operator that sees one share, or any m − 1 of them, sees a discrete Gaussian mechanism.

All coefficients are one. Secret coefficients α ≠ ±1 would hide nothing more: the noise is what hides g, and α n would
have to be rounded, which leaked in earlier versions (Mironov 2012; `blindtune.audit.labels.lattice`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blindtune.keystream import KEY_BYTES
from blindtune.lattice import Lattice, expand_noise
from blindtune.privacy.randomness import SecureGenerator


@dataclass(frozen=True)
class Shares:
    """The m shares of one gradient, in a secret order."""

    shares: Tensor
    """`(m, ...)` float32, multiples of the lattice's step, whose sum is the rounded gradient."""
    carrier: int
    """Index of the one share that depends on g; all others are noise alone."""
    seeds: tuple[bytes | None, ...]
    """For each share of noise the 32 bytes from which `blindtune.lattice.expand_noise` computes it; None for the
    carrier."""


def split_gradient(points: Tensor, m: int, lattice: Lattice, *, generator: SecureGenerator) -> Shares:
    """Splits a gradient on the lattice into m shares and puts them in a secret order.

    Args:
        points: `(...)` int64, in steps (`Lattice.round`).
        m: number of shares, at least 2.
        lattice: made for m − 1 noise terms (`Lattice.for_sigma(terms=m - 1)`); its σ must not follow the gradient.
    Raises:
        ValueError: m < 2.
        LatticeOverflow: the gradient is far larger than the noise.
    """
    if m < 2:
        raise ValueError(f"m = {m}: need at least 2 shares.")
    seeds = [generator.bytes(KEY_BYTES) for _ in range(m - 1)]
    noise = [expand_noise(seed, points.shape, lattice) for seed in seeds]
    carrier = points - sum((n.double() / lattice.step).long() for n in noise)
    order = generator.permutation(m)
    shares = torch.stack([lattice.values(carrier), *noise])[order]
    unordered: list[bytes | None] = [None, *seeds]
    return Shares(shares, order.index(0), tuple(unordered[index] for index in order))


def combine(results: Tensor) -> Tensor:
    """Returns Σ_j backprop(ĝ_j) for results `(m, ...)`, summed in float64, as float32."""
    return results.double().sum(0).float()
