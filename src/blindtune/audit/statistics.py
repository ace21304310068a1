"""AUC and its uncertainty."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Scores = NDArray[np.float64]
Labels = NDArray[np.int64]


def auc(scores: Scores, positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve of `scores (N,)` for the examples marked positive; ties count half.

    Raises:
        ValueError: all examples are positive, or none.
    """
    count = int(positive.sum())
    if not 0 < count < len(positive):
        raise ValueError("AUC needs positive and negative examples.")
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(positive) - count)))


def best_auc(scores: Scores, labels: Labels, *, symmetric: bool) -> tuple[float, int, int]:
    """The best AUC over classes and score columns `(N, S)`: (AUC, class, column).

    Symmetric: an attack without labels doesn't know which end is which, so max(AUC, 1 − AUC) counts.
    """
    best = (0.0, 0, 0)
    for label in np.unique(labels):
        for column in range(scores.shape[1]):
            value = auc(scores[:, column], labels == label)
            value = max(value, 1 - value) if symmetric else value
            best = max(best, (value, int(label), column))
    return best


def bootstrap_auc(
    scores: Scores, positive: NDArray[np.bool_], *, symmetric: bool, resamples: int = 500, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of the AUC over resampled examples."""
    order = np.argsort(scores, kind="stable")
    sorted_scores, marks = scores[order], positive[order]
    weights = np.random.default_rng(seed).multinomial(len(scores), np.full(len(scores), 1 / len(scores)), resamples)
    weights = weights.astype(np.float64)
    negative = np.cumsum(weights * ~marks, axis=1)
    starts = np.searchsorted(sorted_scores, sorted_scores, side="left")
    ends = np.searchsorted(sorted_scores, sorted_scores, side="right") - 1
    below = np.where(starts > 0, negative[:, np.maximum(starts - 1, 0)], 0.0)
    wins = (weights * marks * (below + negative[:, ends]) / 2).sum(1)
    pairs = (weights * marks).sum(1) * negative[:, -1]
    values = wins[pairs > 0] / pairs[pairs > 0]
    if symmetric and np.median(values) < 0.5:
        values = 1 - values
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
