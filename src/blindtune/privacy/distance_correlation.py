"""Distance correlation: how much distances between features say about distances between labels.

The plain estimator (Székely, Rizzo and Bakirov 2007) is biased when features have many more dimensions than a batch has
rows. On independent data its dCor² is about 1/√B against two classes (0.18 at B = 32, so dCor = 0.42), and above 0.9 if
labels have about as many classes as the batch has rows. Here is the bias-corrected one (Székely and Rizzo 2014, section
3): distances are U-centred, and independent data read about zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_BATCH = 4
"""Rows without which U-centring is not defined."""
FLOOR = 0.05
"""Where `log_distance_correlation` stops: what independent batches of 32 read by chance."""


def squared_distance_correlation(x: Tensor, y: Tensor) -> Tensor:
    """The bias-corrected estimator of dCor²(x, y): ⟨Ã, B̃⟩ / (|Ã| |B̃|), with Ã and B̃ the U-centred distance matrices.

    Distances are Euclidean; the value doesn't change when x or y is rotated, moved or scaled. It is 1 if the distances
    in x are those in y up to a factor, about 0 on independent data (as often below), and exactly 0 if all distances in
    x, or in y, are equal (one class in the batch, say). Computed in float64. Gradients are finite everywhere: two equal
    rows don't pull on each other.

    Args:
        x: `(B, d)`, differentiable.
        y: `(B, e)`, differentiable; one-hot labels, say.
    Returns:
        A scalar in [-1, 1], of x's dtype.
    Raises:
        ValueError: fewer than 4 rows, or not as many rows in y as in x.
    """
    if len(x) != len(y) or len(x) < SMALLEST_BATCH:
        raise ValueError(f"{len(x)} and {len(y)} rows: distance correlation needs equally many, at least 4.")
    a, b = _distances(x), _distances(y)
    a_centred, b_centred = _u_centre(a), _u_centre(b)
    product = (a_centred * b_centred).sum()
    a_norm, b_norm = a_centred.pow(2).sum(), b_centred.pow(2).sum()
    tiny = 1e-20  # of the squared distances: what rounding leaves of equal ones
    varied = (a_norm > tiny * a.pow(2).sum()) & (b_norm > tiny * b.pow(2).sum())
    scale = torch.where(varied, a_norm * b_norm, 1.0).sqrt()
    return torch.where(varied, product / scale, 0.0).to(x.dtype)


def log_distance_correlation(x: Tensor, y: Tensor, *, floor: float = FLOOR) -> Tensor:
    """log max(dCor²(x, y), floor), the penalty of the defence (Sun et al. 2022) with the bias-corrected estimator.

    The bias-corrected estimator may be zero or negative, where there is no logarithm. Below the floor the value is log
    floor and the gradient zero: nothing is pushed that can't be told from chance, and the logarithm makes no gradient
    more than 1 / floor times as long.

    Args:
        x, y: as for `squared_distance_correlation`.
        floor: in (0, 1).
    Returns:
        A scalar in [log floor, 0].
    Raises:
        ValueError: as `squared_distance_correlation`, or a floor outside (0, 1).
    """
    if not 0 < floor < 1:
        raise ValueError(f"floor = {floor}: need a number between 0 and 1.")
    return squared_distance_correlation(x, y).clamp_min(floor).log()


def _distances(x: Tensor) -> Tensor:
    """`(B, B)`, float64, by differences: by way of a product of matrices, equal rows would not have distance zero."""
    x = x.double()
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def _u_centre(distances: Tensor) -> Tensor:
    """Ã (definition 2 of the 2014 paper): off the diagonal, all row and column sums are zero; the diagonal is zero."""
    n = len(distances)
    rows = distances.sum(1, keepdim=True) / (n - 2)
    total = distances.sum() / ((n - 1) * (n - 2))
    centred = distances - rows - rows.T + total
    return centred * (1 - torch.eye(n, dtype=distances.dtype, device=distances.device))
