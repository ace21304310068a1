"""Secret mixing of the outputs of n adapters into the head's input (P3EFT, eq. 3 to 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from blindtune.privacy.randomness import SecureGenerator


def mixing_weights(n: int, dim: int, scale: float, *, generator: SecureGenerator, centre: bool = True) -> Tensor:
    """Draws secret weights W (eq. 4): 1/n plus antisymmetric noise ξ_ij ~ N(0, scale²) for each pair of adapters.

    Columns sum to one, so the mixture of n equal outputs is that output (eq. 5). With a large scale, a small difference
    between adapters changes the mixed output much, so each single adapter needs to change little.

    Args:
        centre: whether 1/n is added, as in eq. 4. Without it, as in the authors' code of 2023, columns sum to zero, and
            the mixture of n equal outputs is zero.

    Returns:
        `(n, dim)`, float32.
    Raises:
        ValueError: `n < 2` or `scale <= 0`.
    """
    if n < 2 or scale <= 0:
        raise ValueError(f"n = {n} and scale = {scale}: mixing needs two adapters and a positive scale.")
    weights = torch.full((n, dim), 1.0 / n if centre else 0.0, dtype=torch.float64)
    for i in range(n):
        for j in range(i + 1, n):
            xi = scale * generator.normal(dim)
            weights[i] += xi
            weights[j] -= xi
    return weights.float()


def mix(hidden: Tensor, weights: Tensor) -> Tensor:
    """Returns h' = Σ_i W_i ⊙ h_i (eq. 3), `(B, d)`, for hidden states `(n, B, d)` and weights `(n, d)`."""
    return torch.einsum("n...d,nd->...d", hidden, weights)
