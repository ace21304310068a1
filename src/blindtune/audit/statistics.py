"""AUC, its uncertainty, and what the best of many attacks would reach by luck."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

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

    Symmetric: an attack without labels doesn't know which end is which, nor which column is which class, so
    max(AUC, 1 − AUC) counts, over all pairs. Otherwise column j is for the j-th class.
    """
    best = (0.0, 0, 0)
    for index, label in enumerate(np.unique(labels)):
        for column in range(scores.shape[1]) if symmetric else [min(index, scores.shape[1] - 1)]:
            value = auc(scores[:, column], labels == label)
            value = max(value, 1 - value) if symmetric else value
            best = max(best, (value, int(label), column))
    return best


def mean_auc(draws: Scores, labels: Labels) -> tuple[float, float, float]:
    """The mean AUC over R draws `(R, N, S)` of its best class, and the 2.5% and 97.5% quantiles over draws.

    Texts with NaN are left out: the attacker was given their labels. A single draw has a bootstrap interval over texts.
    """
    if len(draws) == 1:
        scored = np.isfinite(draws[0, :, 0])
        value, label, column = best_auc(draws[0, scored], labels[scored], symmetric=False)
        low, high = bootstrap_auc(draws[0, scored, column], labels[scored] == label, symmetric=False)
        return value, low, high
    by_class: list[list[float]] = []
    for column, label in enumerate(np.unique(labels)):
        by_class.append([])
        for draw in draws:
            scored = np.isfinite(draw[:, column])
            by_class[-1].append(auc(draw[scored, column], labels[scored] == label))
    best = max(by_class, key=lambda values: float(np.mean(values)))
    low, high = np.percentile(best, [2.5, 97.5])
    return float(np.mean(best)), float(low), float(high)


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


@dataclass(frozen=True)
class CachedScores:
    """Scores `(N, S)` of an attack that used no labels, and the examples that they belong to."""

    rows: Sequence[Hashable]
    scores: Scores


@dataclass(frozen=True)
class Chance:
    """What the best of many attacks reaches where there is nothing to find.

    Attributes:
        quantile: 95% of the maxima over all attacks are below this, if labels have nothing to do with what was seen.
        p: the chance of a maximum as high as the one found, at least 1 / (permutations + 1).
        scores: how many score vectors compete.
    """

    quantile: float
    p: float
    scores: int
    permutations: int


def chance_of_maximum(
    cached: Sequence[CachedScores], labels: Mapping[Hashable, int], *, permutations: int = 1000, seed: int = 0
) -> Chance:
    """Permutation test of the maximum over all attacks, channels and moments (Westfall and Young 1993).

    Labels are permuted over the texts, the same permutation for all attacks, and only the scoring is repeated:
    scores of attacks that use no labels stay what they are. Dependence between attacks is thereby kept.

    Raises:
        ValueError: nothing to score.
    """
    if not cached:
        raise ValueError("There are no scores.")
    texts = list(dict.fromkeys(row for rows in {id(c.rows): c.rows for c in cached}.values() for row in rows))
    place = {text: index for index, text in enumerate(texts)}
    truth = np.array([labels[text] for text in texts])
    random = np.random.default_rng(seed)
    permuted = np.stack([truth, *(random.permutation(truth) for _ in range(permutations))], axis=1)  # (N, 1 + R)
    groups: dict[int, tuple[Sequence[Hashable], list[Scores]]] = {}
    for entry in cached:
        groups.setdefault(id(entry.rows), (entry.rows, []))[1].append(entry.scores)
    classes = np.unique(truth)
    maxima = np.zeros(1 + permutations)
    for rows, scores in groups.values():
        columns = np.concatenate(scores, axis=1)
        ranks = rankdata(columns, axis=0).T.astype(np.float32)  # (S, N)
        drawn = permuted[[place[row] for row in rows]]
        for label in classes[1:] if len(classes) == 2 else classes:
            positive = (drawn == label).astype(np.float32)
            count = positive.sum(0, dtype=np.float64)
            pairs = np.maximum(count * (len(drawn) - count), 1.0)
            wins = (ranks @ positive).astype(np.float64) - count * (count + 1) / 2
            found = np.abs(wins / pairs - 0.5) + 0.5
            found[:, (count == 0) | (count == len(drawn))] = 0.5
            maxima = np.maximum(maxima, found.max(0))
    null = maxima[1:]
    p = (1 + int((null >= maxima[0] - 1e-6).sum())) / (1 + permutations)
    total = sum(entry.scores.shape[1] for entry in cached)
    return Chance(float(np.quantile(null, 0.95)), p, total, permutations)
