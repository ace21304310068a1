"""Computes AUCs, their intervals, and the distribution of the highest AUC of many attacks under chance."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Scores = NDArray[np.float64]
Labels = NDArray[np.int64]


def auc(scores: Scores, positive: NDArray[np.bool_]) -> float:
    """Returns the area under the ROC curve of `scores (N,)` for the examples marked positive; ties count half.

    Raises:
        ValueError: all examples are positive, or none.
    """
    count = int(positive.sum())
    if not 0 < count < len(positive):
        raise ValueError("AUC needs positive and negative examples.")
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(positive) - count)))


def best_auc(scores: Scores, labels: Labels, *, symmetric: bool) -> tuple[float, int, int]:
    """Returns the best AUC over classes and score columns `(N, S)`: (AUC, class, column).

    Args:
        symmetric: whether the attack had no labels. It then doesn't know which class has the high scores, nor which
            column belongs to which class, so the result is the maximum of AUC and 1 − AUC over all pairs. Otherwise
            column j is for the j-th class.
    """
    best = (0.0, 0, 0)
    for index, label in enumerate(np.unique(labels)):
        for column in range(scores.shape[1]) if symmetric else [min(index, scores.shape[1] - 1)]:
            value = auc(scores[:, column], labels == label)
            value = max(value, 1 - value) if symmetric else value
            best = max(best, (value, int(label), column))
    return best


def mean_auc(draws: Scores, labels: Labels) -> tuple[float, float, float]:
    """Returns the mean AUC over R draws `(R, N, S)` for the best class, and its 2.5% and 97.5% quantiles.

    Texts with NaN are left out, because the attacker knows their labels. For a single draw, the interval is a bootstrap
    interval over texts.
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
    """Returns the 95% percentile interval of the AUC over resampled examples."""
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
    """Holds scores `(N, S)` of an attack without labels, and the examples that they belong to.

    Attacks on the same examples should share one `rows` object, so that the permutation test ranks them together.
    """

    rows: Sequence[Hashable]
    scores: Scores


@dataclass(frozen=True)
class Chance:
    """Describes the maximum AUC over many attacks if the labels are independent of what the servers received.

    Attributes:
        quantile: 95% of the maxima are below this value.
        p: probability of a maximum at least as high as the measured one, at least 1 / (permutations + 1).
        scores: number of score vectors.
    """

    quantile: float
    p: float
    scores: int
    permutations: int


def chance_of_maximum(
    cached: Sequence[CachedScores], labels: Mapping[Hashable, int], *, permutations: int = 1000, seed: int = 0
) -> Chance:
    """Runs a permutation test of the maximum over attacks, channels and steps (Westfall and Young 1993).

    The test permutes the labels over the texts, with the same permutation for all attacks, and repeats the scoring
    only, because the scores of attacks without labels don't change. This preserves the dependence between attacks.

    Raises:
        ValueError: nothing to score.
    """
    if not cached:
        raise ValueError("There are no scores.")
    groups = _by_rows(cached)
    texts = list(dict.fromkeys(row for rows, _ in groups for row in rows))
    index_of = {text: index for index, text in enumerate(texts)}
    true_labels = np.array([labels[text] for text in texts])
    random = np.random.default_rng(seed)
    shuffled = [random.permutation(true_labels) for _ in range(permutations)]
    permuted = np.stack([true_labels, *shuffled], axis=1)  # (N, 1 + R)
    classes = np.unique(true_labels)
    maxima = np.zeros(1 + permutations)
    for rows, scores in groups:
        columns = np.concatenate(scores, axis=1)
        ranks = rankdata(columns, axis=0).T.astype(np.float32)  # (S, N)
        drawn = permuted[[index_of[row] for row in rows]]
        for label in classes[1:] if len(classes) == 2 else classes:
            positive = (drawn == label).astype(np.float32)
            count = positive.sum(0, dtype=np.float64)
            pairs = np.maximum(count * (len(drawn) - count), 1.0)
            wins = (ranks @ positive).astype(np.float64) - count * (count + 1) / 2
            aucs = np.abs(wins / pairs - 0.5) + 0.5
            aucs[:, (count == 0) | (count == len(drawn))] = 0.5
            maxima = np.maximum(maxima, aucs.max(0))
    null = maxima[1:]
    p = (1 + int((null >= maxima[0] - 1e-6).sum())) / (1 + permutations)
    total = sum(entry.scores.shape[1] for entry in cached)
    return Chance(float(np.quantile(null, 0.95)), p, total, permutations)


def _by_rows(cached: Sequence[CachedScores]) -> list[tuple[Sequence[Hashable], list[Scores]]]:
    """Returns the scores of all attacks that share one `rows` object, with these rows."""
    groups: list[tuple[Sequence[Hashable], list[Scores]]] = []
    for entry in cached:
        for rows, scores in groups:
            if rows is entry.rows:
                scores.append(entry.scores)
                break
        else:
            groups.append((entry.rows, [entry.scores]))
    return groups
