"""Gaussian noise on every token's hidden state: the one defence of smashed data here that has a guarantee.

    s' = s · min(1, C / |s|) + N(0, (ν C)²), on a public lattice (`blindtune.lattice`)

Changing one token of a text changes its own hidden state by at most 2C, so its row in one message is a Gaussian
mechanism with μ = 2 / ν (Dong, Roth and Su 2022), and μ √v after v messages with fresh noise. What later tokens' rows
tell of it is not counted: in a causal model they depend on it too, so this is a bound for a row and not for the text.

Rows are rounded to the lattice before discrete Gaussian noise is added, and the sum is exact in float32: no low-order
bit tells two rows apart. What a codec rounds afterwards is a function of that sum and tells no more.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from blindtune.lattice import Lattice
from blindtune.privacy.randomness import SecureGenerator


def add_token_noise(smashed: Tensor, clip_norm: float, noise: float, *, generator: SecureGenerator) -> Tensor:
    """`(N, d)` with every row clipped to `clip_norm` C, and noise of standard deviation `noise` · C on each value.

    The noise must be secret, and never be used for two messages: whoever can draw it again takes it off, and the
    difference of two messages with one noise is that of their hidden states.

    Raises:
        ValueError: a number that isn't positive.
    """
    if not (clip_norm > 0 and noise > 0):
        raise ValueError(f"clip_norm = {clip_norm}, noise = {noise}: must be positive.")
    lattice = Lattice.for_sigma(noise * clip_norm, largest=clip_norm)
    longest = clip_norm - lattice.step * math.sqrt(smashed.shape[-1])  # rounding adds less than the difference
    clipped = clip_rows(smashed, longest)
    points = lattice.round(clipped.detach().cpu(), generator)
    noise_of = generator.bound_to(points)  # a message that is made again with other values has other noise
    noisy = lattice.values(points + lattice.noise(noise_of, points.shape)).to(smashed)
    return cast(Tensor, _Replace.apply(clipped, noisy))


class _Replace(torch.autograd.Function):
    """Another value with the same gradient. Adding a difference in floating point would round after the noise."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        return other

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_outputs[0], None


def clip_rows(smashed: Tensor, clip_norm: float) -> Tensor:
    """`(N, d)` with every row scaled down to `clip_norm`, unless it is as short already."""
    norms = smashed.norm(dim=-1, keepdim=True)
    return smashed * (clip_norm / norms.clamp_min(1e-12)).clamp_max(1.0)


def row_mu(noise: float, views: int) -> float:
    """μ of one row after so many messages with fresh noise: 2 √views / noise."""
    return 2.0 * math.sqrt(views) / noise
