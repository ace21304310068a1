"""AUC and bootstrap."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from blindtune.audit.statistics import CachedScores, auc, best_auc, bootstrap_auc, chance_of_maximum, mean_auc


def sample(shift: float, rows: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, rows)
    return rng.normal(0, 1, rows) + shift * labels, labels


def test_auc_equals_scikit_learn_with_ties():
    scores, labels = sample(0.7)
    scores = scores.round(1)
    assert auc(scores, labels == 1) == pytest.approx(roc_auc_score(labels, scores))


def test_one_class_has_no_auc():
    with pytest.raises(ValueError, match="positive and negative"):
        auc(np.zeros(3), np.ones(3, bool))


def test_an_attack_without_labels_may_point_either_way_and_one_with_labels_may_not():
    scores, labels = sample(-2.0)
    blind = best_auc(scores[:, None], labels, symmetric=True)[0]
    assert blind > 0.85
    told = best_auc(np.stack([scores, -scores], 1), labels, symmetric=False)
    assert told[0] == pytest.approx(blind)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    truth = roc_auc_score(*reversed(sample(0.5, 200_000)))
    hits = 0
    for seed in range(200):
        scores, labels = sample(0.5, 300, seed + 1)
        low, high = bootstrap_auc(scores, labels == 1, symmetric=False, resamples=300)
        hits += low <= truth <= high
    assert 180 <= hits <= 199


def test_intervals_handle_ties():
    scores, labels = sample(0.5)
    low, high = bootstrap_auc(scores.round(0), labels == 1, symmetric=False)
    assert low < roc_auc_score(labels, scores.round(0)) < high


def maximum(leak: float, seed: int) -> tuple[float, float]:
    """The p-value and the quantile for 20 scores of 300 texts, of which one tells the labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 300)
    rows = list(range(300))
    scores = rng.normal(0, 1, (300, 20))
    scores[:, 0] += leak * labels
    found = chance_of_maximum([CachedScores(rows, scores)], dict(enumerate(labels.tolist())), permutations=200)
    return found.p, found.quantile


def test_the_best_of_many_attacks_alarms_by_luck_as_rarely_as_it_says():
    assert sum(maximum(0.0, seed)[0] <= 0.05 for seed in range(200)) <= 18  # 99% quantile of a binomial


def test_a_weak_leak_is_told_from_luck():
    assert all(maximum(0.6, seed)[0] <= 0.05 for seed in range(20))


def test_guessing_with_more_attacks_reaches_further():
    assert 0.56 < maximum(0.0, 0)[1] < 0.62


def test_means_over_draws_leave_out_known_texts():
    labels = np.array([0, 0, 0, 1, 1, 1])
    draw = np.array([[0.0, 1.0, 2.0, 3.0, 4.0, np.nan]]).T
    assert mean_auc(np.stack([np.hstack([-draw, draw])] * 2), labels)[0] == 1.0
