"""Gradient shares: m noise-like tensors whose secret combination is the gradient (P3EFT, Algorithm 1).

Backpropagation is linear in its cotangent, so backprop(g) = Σ_j α_j backprop(ĝ_j) whenever g = Σ_j α_j ĝ_j. An
operator that sees one share sees the Gaussian mechanism applied to g.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blindtune.keystream import KEY_BYTES, expand_noise
from blindtune.privacy.randomness import SecureGenerator


@dataclass(frozen=True)
class Shares:
    """`shares (m, ...)` float32 and secret `coefficients (m,)` float64 with Σ_j coefficients_j · shares_j = g."""

    shares: Tensor
    coefficients: Tensor
    carrier: int
    """Index of the one share that depends on g; all others are noise alone."""
    seeds: tuple[bytes | None, ...]
    """For every other share the 32 bytes that `expand_noise` makes it of."""


def split_gradient(gradient: Tensor, m: int, sigma: float, *, generator: SecureGenerator) -> Shares:
    """Splits g into m shares, each of which is Gaussian noise of standard deviation ≥ σ around 0 or around g.

    m − 1 shares are N(0, σ²), each expanded from a seed that can travel in its place. The last is g − Σ_j α_j ĝ_j
    with a secret direction α, |α| in [1, 1.25), so its noise has standard deviation |α| σ ≥ σ. A secret order decides
    which one that is. Everything is drawn and added in float64 and rounded once to float32; since α is irrational in
    effect, the rounded sum lies on no lattice that would depend on g (Mironov 2012).

    Args:
        gradient: `(...)`, finite.
        m: number of shares, at least 2.
        sigma: noise standard deviation, fixed and public: it must not follow the gradient's norm.
    Raises:
        ValueError: m < 2, σ ≤ 0, or a gradient with NaN or infinity.
    """
    if m < 2 or sigma <= 0:
        raise ValueError(f"m = {m} and sigma = {sigma}: need m of at least 2 and a positive sigma.")
    if not bool(torch.isfinite(gradient).all()):
        raise ValueError("The gradient holds NaN or infinity; nothing was sent.")
    direction = generator.normal(m - 1)
    length = 1.0 + 0.25 * (1.0 - generator.uniform(1))
    alpha = length * direction / direction.norm()  # (m - 1,)
    seeds = [generator.bytes(KEY_BYTES) for _ in range(m - 1)]
    noise = torch.stack([expand_noise(seed, gradient.shape, sigma) for seed in seeds])
    carrier = gradient.double() - torch.tensordot(alpha, noise.double(), dims=1)
    order = generator.permutation(m)
    shares = torch.cat([carrier.float().unsqueeze(0), noise])[order]
    coefficients = torch.cat([torch.ones(1, dtype=torch.float64), alpha])[order]
    placed: list[bytes | None] = [None, *seeds]
    return Shares(shares, coefficients, order.index(0), tuple(placed[index] for index in order))


def combine(results: Tensor, coefficients: Tensor) -> Tensor:
    """Σ_j α_j backprop(ĝ_j) from results `(m, ...)`: added in float64, returned as float32."""
    return torch.tensordot(coefficients, results.double(), dims=1).float()


def clip_per_example(gradient: Tensor, norm: float) -> Tensor:
    """Scales down every example of `(n, B, ...)` whose norm over all but axis 1 is above `norm`.

    All n adapters of an example share one factor: an operator sees them together, so the bound must hold for them
    together (the C of the Gaussian mechanism).
    """
    axes = [axis for axis in range(gradient.ndim) if axis != 1]
    norms = torch.linalg.vector_norm(gradient, dim=axes, keepdim=True)  # (1, B, 1, ...)
    return gradient * (norm / norms.clamp_min(norm))
