"""Every attack finds a planted leak of its kind and nothing in noise."""

import numpy as np
import pytest

from blindtune.audit.labels import ATTACKS
from blindtune.audit.statistics import best_auc


def noise(rows: int = 600, dim: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1, (rows, dim)).astype(np.float32), rng.integers(0, 2, rows)


def planted(kind: str) -> tuple[np.ndarray, np.ndarray]:
    features, labels = noise()
    if kind == "norm":
        features *= (1 + labels)[:, None]
    else:
        features[:, 3] += 4.0 * labels
    return features, labels


def score(name: str, features: np.ndarray, labels: np.ndarray) -> float:
    attack = ATTACKS[name]
    return best_auc(attack.run(features, labels), labels, symmetric=attack.symmetric)[0]


@pytest.mark.parametrize("name", list(ATTACKS))
def test_a_planted_leak_is_found(name):
    assert score(name, *planted(name)) > 0.95


@pytest.mark.parametrize("name", list(ATTACKS))
def test_noise_shows_nothing(name):
    assert score(name, *noise()) < 0.58


@pytest.mark.parametrize("name", ["spectral", "components", "bimodal component", "norm", "k-means"])
def test_attacks_that_know_nothing_do_not_use_labels(name):
    """Permuting labels must not change scores."""
    features, labels = planted(name)
    shuffled = np.random.default_rng(1).permutation(labels)
    assert np.array_equal(ATTACKS[name].run(features, labels), ATTACKS[name].run(features, shuffled))


@pytest.mark.parametrize("name", ["k-means", "logistic regression"])
def test_three_classes_are_told_apart(name):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    features = (rng.normal(0, 1, (300, 10)) + 5 * np.eye(10)[labels]).astype(np.float32)
    assert score(name, features, labels) > 0.95


def test_the_probe_is_scored_on_examples_that_it_was_not_fitted_on():
    """More dimensions than rows fit any labels perfectly; held-out folds must still be chance."""
    features, labels = noise(rows=120, dim=400)
    assert 0.3 < score("logistic regression", features, labels) < 0.7
