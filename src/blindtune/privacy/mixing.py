"""Secret weights that mix n adapters' outputs into the one that the head reads (P3EFT, eq. 3 to 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from blindtune.privacy.randomness import SecureGenerator


def mixing_weights(n: int, dim: int, scale: float, *, generator: SecureGenerator) -> Tensor:
    """Secret weights W (eq. 4): 1/n plus antisymmetric noise ξ_ij ~ N(0, scale²) for each pair of adapters.

    Columns sum to one, so n equal outputs mix into themselves (eq. 5). A large scale lets a small difference
    between adapters move the mixed output far: each adapter on its own then needs to change little.

    Returns:
        `(n, dim)`, float32.
    Raises:
        ValueError: `n < 2` or `scale <= 0`.
    """
    if n < 2 or scale <= 0:
        raise ValueError(f"n = {n} and scale = {scale}: mixing needs two adapters and a positive scale.")
    weights = torch.full((n, dim), 1.0 / n, dtype=torch.float64)
    for i in range(n):
        for j in range(i + 1, n):
            xi = scale * generator.normal(dim)
            weights[i] += xi
            weights[j] -= xi
    return weights.float()


def mix(hidden: Tensor, weights: Tensor) -> Tensor:
    """h' = Σ_i W_i ⊙ h_i (eq. 3) for hidden states `(n, B, d)` and weights `(n, d)`: `(B, d)`."""
    return torch.einsum("n...d,nd->...d", hidden, weights)
