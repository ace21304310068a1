"""Adds Gaussian noise to every token's hidden state: the only defence of hidden states that has a formal guarantee.

    s' = s · min(1, C / |s|) + N(0, (ν C)²), on a public lattice (`blindtune.lattice`)

Changing one token of a text changes its own hidden state by at most 2C, so its row in one message is a Gaussian
mechanism with μ = 2 / ν (Dong, Roth and Su 2022), and μ √v after v messages with fresh noise. What the rows of later
tokens reveal about it is not counted: in a causal model they depend on it too, so this bounds a row, not the text.

Rows are rounded to the lattice before discrete Gaussian noise is added, and the sum is exact in float32: no low-order
bit distinguishes two rows. The quantized values that are sent are a function of that sum and reveal no more.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from blindtune.lattice import Lattice
from blindtune.privacy.randomness import SecureGenerator


def add_token_noise(smashed: Tensor, clip_norm: float, noise: float, *, generator: SecureGenerator) -> Tensor:
    """Clips every row of `(N, d)` to the norm `clip_norm` C and adds noise of standard deviation `noise` · C.

    The noise must be secret and never be used for two messages: anyone who can reproduce it can subtract it, and the
    difference of two messages with the same noise is the difference of their hidden states.

    Raises:
        ValueError: `clip_norm` or `noise` isn't positive.
    """
    if not (clip_norm > 0 and noise > 0):
        raise ValueError(f"clip_norm = {clip_norm}, noise = {noise}: must be positive.")
    lattice = Lattice.for_sigma(noise * clip_norm, largest=clip_norm)
    # rounding lengthens a row by less than this difference
    longest = clip_norm - lattice.step * math.sqrt(smashed.shape[-1])
    clipped = clip_rows(smashed, longest)
    points = lattice.round(clipped.detach().cpu(), generator)
    bound = generator.bound_to(points)  # a repeated message with other values gets other noise
    noisy = lattice.values(points + lattice.noise(bound, points.shape)).to(smashed)
    return cast(Tensor, _Replace.apply(clipped, noisy))


class _Replace(torch.autograd.Function):
    """Replaces a value and passes its gradient through.

    The usual `value + (other - value).detach()` would round after the noise was added.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        return other

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_outputs[0], None


def clip_rows(smashed: Tensor, clip_norm: float) -> Tensor:
    """Scales every row of `(N, d)` that is longer than `clip_norm` down to that norm."""
    norms = smashed.norm(dim=-1, keepdim=True)
    return smashed * (clip_norm / norms.clamp_min(1e-12)).clamp_max(1.0)


def row_mu(noise: float, views: int) -> float:
    """Returns μ of one row after `views` messages with fresh noise: 2 √views / noise."""
    return 2.0 * math.sqrt(views) / noise
