"""Distance correlation: a measure of dependence between features and labels, computed from pairwise distances.

The plain estimator (Székely, Rizzo and Bakirov 2007) is biased when features have many more dimensions than a batch has
rows. On independent data its dCor² is about 1/√B against two classes (0.18 at B = 32, so dCor = 0.42), and above 0.9 if
labels have about as many classes as the batch has rows. The default is the bias-corrected estimator (Székely and Rizzo
2014, section 3): it centres distances by U-centring, and is about zero on independent data. The plain one, which
P3EFT's authors use for their baseline, is there for comparison.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["unbiased", "biased"]
SMALLEST_BATCH = 4
"""Smallest number of rows for which U-centring is defined."""
FLOOR = 0.05
"""Default floor of `log_distance_correlation`: a value that independent batches of 32 rows reach by chance."""
SMALLEST = 1e-6
"""Floor for the biased estimator, which is never negative: it only keeps the logarithm finite."""


def squared_distance_correlation(x: Tensor, y: Tensor, estimator: Estimator = "unbiased") -> Tensor:
    """Returns an estimate of dCor²(x, y): ⟨Ã, B̃⟩ / (|Ã| |B̃|), with centred distance matrices Ã, B̃.

    Distances are Euclidean; the value is invariant to rotations, translations and scalings of x or y. It is 1 if the
    distances in x are proportional to those in y, about 0 on independent data (and as often negative), and exactly 0 if
    all distances in x, or in y, are equal (for example with one class in the batch). It is computed in float64.
    Gradients are finite everywhere: the distance between two equal rows has gradient zero.

    Args:
        x: `(B, d)`, differentiable.
        y: `(B, e)`, differentiable; for example one-hot labels.
        estimator: "unbiased" centres by U-centring; "biased" centres rows and columns around zero (2007), and is large
            on independent data.
    Returns:
        A scalar in [-1, 1], of x's dtype; in [0, 1] for the biased estimator.
    Raises:
        ValueError: there are fewer than 4 rows, or y has another number of rows than x.
    """
    if len(x) != len(y) or len(x) < SMALLEST_BATCH:
        raise ValueError(f"{len(x)} and {len(y)} rows: distance correlation needs equally many, at least 4.")
    a, b = _distances(x), _distances(y)
    centre = _u_centre if estimator == "unbiased" else _double_centre
    a_centred, b_centred = centre(a), centre(b)
    product = (a_centred * b_centred).sum()
    a_norm, b_norm = a_centred.pow(2).sum(), b_centred.pow(2).sum()
    tiny = 1e-20  # relative to the squared distances: rounding errors of equal distances are smaller
    varied = (a_norm > tiny * a.pow(2).sum()) & (b_norm > tiny * b.pow(2).sum())
    scale = torch.where(varied, a_norm * b_norm, 1.0).sqrt()
    return torch.where(varied, product / scale, 0.0).to(x.dtype)


def log_distance_correlation(
    x: Tensor, y: Tensor, *, floor: float | None = None, estimator: Estimator = "unbiased"
) -> Tensor:
    """Returns log max(dCor²(x, y), floor): the penalty of Sun et al. (2022), by default bias-corrected.

    The bias-corrected estimate may be zero or negative, where the logarithm is undefined. Below the floor the value is
    log floor and the gradient zero: a dependence that can't be distinguished from chance isn't penalised, and the
    logarithm increases the length of a gradient at most by the factor 1 / floor.

    Args:
        x, y, estimator: as for `squared_distance_correlation`.
        floor: in (0, 1). Default: `FLOOR`, or `SMALLEST` for the biased estimator.
    Returns:
        A scalar in [log floor, 0].
    Raises:
        ValueError: as `squared_distance_correlation`, or the floor is outside (0, 1).
    """
    if floor is None:
        floor = FLOOR if estimator == "unbiased" else SMALLEST
    if not 0 < floor < 1:
        raise ValueError(f"floor = {floor}: need a number between 0 and 1.")
    return squared_distance_correlation(x, y, estimator).clamp_min(floor).log()


def _distances(x: Tensor) -> Tensor:
    """Returns pairwise distances `(B, B)`, float64, from differences of rows.

    The faster computation by a matrix product would give equal rows a distance other than zero.
    """
    x = x.double()
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def _u_centre(distances: Tensor) -> Tensor:
    """Returns the U-centred matrix Ã (definition 2 of the 2014 paper). Rows and columns sum to 0; the diagonal is 0."""
    n = len(distances)
    rows = distances.sum(1, keepdim=True) / (n - 2)
    total = distances.sum() / ((n - 1) * (n - 2))
    centred = distances - rows - rows.T + total
    return centred * (1 - torch.eye(n, dtype=distances.dtype, device=distances.device))


def _double_centre(distances: Tensor) -> Tensor:
    """Returns the matrix of which each row and each column has mean 0 (definition 3 of the 2007 paper)."""
    rows = distances.mean(1, keepdim=True)
    return distances - rows - rows.T + distances.mean()
