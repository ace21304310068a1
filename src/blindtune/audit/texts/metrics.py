"""Defines six metrics of reconstruction in [0, 1], which compare a guessed sequence with the ground truth.

| metric | counts |
|---|---|
| accuracy | positions with the right token; the primary metric |
| rouge1, rouge2 | n-grams in common (Lin 2004), F1 |
| rougeL | the longest common subsequence (Lin 2004), F1 |
| set_f1 | distinct tokens in common, F1, without order |
| meteor | matches, with a penalty for wrong order (Banerjee and Lavie 2005) |

METEOR matches exact tokens only, without stems or synonyms. Its alignment is greedy from the left, and takes the
longest remaining run at each position. This gives the most matches, but not always the fewest chunks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Tokens = Sequence[Hashable]


def accuracy(ground_truth: Tokens, guess: Tokens) -> float:
    """Returns the fraction of positions with equal tokens. Raises `ValueError` for lengths that differ, or are 0."""
    if len(ground_truth) != len(guess) or not ground_truth:
        raise ValueError(f"{len(guess)} guesses for {len(ground_truth)} tokens")
    return sum(a == b for a, b in zip(ground_truth, guess, strict=True)) / len(ground_truth)


def rouge_n(ground_truth: Tokens, guess: Tokens, n: int) -> float:
    """Returns F1 of the n-grams, with repetitions."""
    true_grams, grams = (Counter(tuple(s[i : i + n]) for i in range(len(s) - n + 1)) for s in (ground_truth, guess))
    return _f1((true_grams & grams).total(), true_grams.total(), grams.total())


def rouge_l(ground_truth: Tokens, guess: Tokens) -> float:
    """Returns F1 of the longest common subsequence."""
    longest = [0] * (len(guess) + 1)
    for token in ground_truth:
        diagonal = 0
        for j, other in enumerate(guess, start=1):
            above = longest[j]
            longest[j] = diagonal + 1 if token == other else max(above, longest[j - 1])
            diagonal = above
    return _f1(longest[-1], len(ground_truth), len(guess))


def set_f1(ground_truth: Tokens, guess: Tokens) -> float:
    """Returns F1 of the distinct tokens."""
    return _f1(len(set(ground_truth) & set(guess)), len(set(ground_truth)), len(set(guess)))


def meteor(ground_truth: Tokens, guess: Tokens) -> float:
    """Returns Fmean (1 − penalty), where Fmean = 10PR / (R + 9P) and penalty = 0.5 (chunks / matches)³."""
    aligned = _align(ground_truth, guess)
    matches = len(aligned)
    if not matches:
        return 0.0
    chunks = 1 + sum(b != (a[0] + 1, a[1] + 1) for a, b in pairwise(aligned))
    precision, recall = matches / len(guess), matches / len(ground_truth)
    return 10 * precision * recall / (recall + 9 * precision) * (1 - 0.5 * (chunks / matches) ** 3)


def _align(ground_truth: Tokens, guess: Tokens) -> list[tuple[int, int]]:
    """Returns pairs (position in guess, position in ground truth), each position at most once, ordered by guess."""
    free: dict[Hashable, list[int]] = {}
    for j, token in enumerate(ground_truth):
        free.setdefault(token, []).append(j)
    taken: set[int] = set()
    pairs: list[tuple[int, int]] = []

    def run(i: int, j: int) -> int:
        length = 0
        while (
            i + length < len(guess) and j + length < len(ground_truth) and guess[i + length] == ground_truth[j + length]
        ):
            if j + length in taken:
                break
            length += 1
        return length

    for i, token in enumerate(guess):
        positions = [j for j in free.get(token, []) if j not in taken]
        if positions:
            following = pairs[-1][1] + 1 if pairs and pairs[-1][0] == i - 1 else -1
            chosen = following if following in positions else max(positions, key=lambda j: (run(i, j), -j))
            taken.add(chosen)
            pairs.append((i, chosen))
    return pairs


def _f1(common: int, true: int, guessed: int) -> float:
    return 2 * common / (true + guessed) if common else 0.0


METRICS: dict[str, Callable[[Tokens, Tokens], float]] = {
    "accuracy": accuracy,
    "rouge1": lambda ground_truth, guess: rouge_n(ground_truth, guess, 1),
    "rouge2": lambda ground_truth, guess: rouge_n(ground_truth, guess, 2),
    "rougeL": rouge_l,
    "set_f1": set_f1,
    "meteor": meteor,
}
ON_WORDS = ("rouge1", "rouge2", "rougeL", "meteor")
"""Metrics that compare words, as is usual for them, if texts can be decoded. The others always compare tokens."""


@dataclass(frozen=True)
class Interval:
    """Holds a mean over texts with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: Sequence[float], *, weights: Sequence[float], resamples: int = 1000) -> Interval:
    """Returns the weighted mean and its 95% interval over resampled texts. Raises `ValueError` without values."""
    if not values:
        raise ValueError("There is nothing to average.")
    data, weight = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(0, len(data), (resamples, len(data)))
    means = (data * weight)[drawn].sum(1) / weight[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float((data * weight).sum() / weight.sum()), float(low), float(high))
