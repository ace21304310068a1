"""Every attack finds a planted leak of its kind and nothing in noise."""

from typing import get_args

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from blindtune.audit.labels import ATTACKS, SHARE_ATTACKS, UPDATE_ATTACKS, Channel, catalogue
from blindtune.audit.labels.boosting import NAME, classifier
from blindtune.audit.labels.published import PUBLISHED, published_measures, worst_adapter
from blindtune.audit.labels.registry import Knowledge, Needs, Observes
from blindtune.audit.statistics import best_auc, mean_auc


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
    scores = attack.run(Channel(features, len(np.unique(labels))), labels)
    return mean_auc(scores, labels)[0] if scores.ndim == 3 else best_auc(scores, labels, symmetric=attack.symmetric)[0]


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
    channel = Channel(features)
    assert np.array_equal(ATTACKS[name].run(channel, labels), ATTACKS[name].run(channel, shuffled))


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


def test_probes_with_few_labels_are_scored_on_the_other_texts_only():
    features, labels = planted("few")
    for count in (16, 64, 256):
        scores = ATTACKS[f"probe with {count} labels"].run(Channel(features), labels)
        assert (np.isnan(scores[:, :, 0]).sum(1) == count).all()
    assert ATTACKS["probe with 256 labels"].run(Channel(features[:300]), labels[:300]) is None


def test_more_known_labels_tell_more():
    features, labels = noise(dim=200)
    features[:, :20] += 0.35 * labels[:, None]
    found = [score(f"probe with {count} labels", features, labels) for count in (16, 64, 256)]
    assert found[0] < found[1] < found[2]


def test_boosted_trees_fit_noise_perfectly_and_learn_nothing_from_it():
    """The paper's check of noisy gradients: at most 52% on a balanced test set, with a perfect fit on training."""
    rng = np.random.default_rng(0)
    labels = np.tile([0, 1], 3000)
    gradients = rng.normal(0, 0.05, (6000, 1)) + np.where(labels, 0.01, -0.01)[:, None]
    shares = (gradients @ rng.normal(0, 1, (1, 16)) + rng.normal(0, 10, (6000, 16))).astype(np.float32)
    model = classifier().set_params(max_depth=12).fit(shares[:1000], labels[:1000])
    assert (model.predict(shares[:1000]) == labels[:1000]).mean() == 1.0
    assert (model.predict(shares[1000:]) == labels[1000:]).mean() <= 0.52


@pytest.mark.parametrize("shape", [(40, 300), (300, 40)])
def test_components_are_those_of_the_singular_value_decomposition(shape):
    features = np.random.default_rng(0).normal(size=shape).astype(np.float32) * np.linspace(1, 3, shape[1])
    centred = features - features.mean(0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    found = Channel(features.astype(np.float32)).components(5)
    np.testing.assert_allclose(np.abs(found), np.abs(left[:, :5] * values[:5]), rtol=1e-3, atol=1e-2)


def test_every_attack_declares_what_it_observes_and_what_it_needs_to_know():
    rows = {row.name: row for row in catalogue()}
    assert list(rows) == [*ATTACKS, *SHARE_ATTACKS, *UPDATE_ATTACKS]
    for row in rows.values():
        assert row.observes in get_args(Observes)
        assert row.knows in Knowledge
        assert set(row.needs) <= set(get_args(Needs))
    assert rows[NAME].observes == "one gradient channel"
    assert rows["probe with 64 labels"].observes == "one channel"
    assert (rows["probe with 64 labels"].knows, rows["probe with 64 labels"].needs) == ("64 labels", ())
    assert (rows["Gram matrix"].observes, rows["Gram matrix"].knows) == ("shares that met", "nothing")
    assert (rows["sum over adapters"].observes, rows["sum over adapters"].needs) == ("any share", ())
    assert rows["update inverted"].observes == "consecutive adapters"
    adam = rows["update inverted, Adam"]
    assert (adam.observes, adam.knows) == ("all adapters since the first step", "nothing")
    assert adam.needs == ("the model", "the texts of each step", "Adam's β")


def test_updates_are_wanted_without_gaps_where_all_adapters_are_observed():
    assert {name: attack.consecutive for name, attack in UPDATE_ATTACKS.items()} == {
        "update inverted": False,
        "update inverted, Adam": True,
    }


def test_the_papers_measures_find_what_is_there_and_nothing_in_noise():
    found = {kind: published_measures(*planted(kind)) for kind in ("shift", "norm")}
    assert min(found["shift"][name] for name in ("spectral", "k-means accuracy", "logistic regression")) > 0.95
    assert found["norm"]["norm"] > 0.95
    assert max(published_measures(*noise()).values()) < 0.6
    assert tuple(found["shift"]) == PUBLISHED


def test_the_papers_logistic_regression_and_k_means_are_those_of_scikit_learn():
    features, labels = noise(90, 5)
    features[:, 0] += 1.5 * labels
    found = published_measures(features, labels)
    assert found["logistic regression"] == pytest.approx(
        cross_val_score(LogisticRegression(), features, labels, cv=3).mean()
    )
    clusters = KMeans(2, n_init=10, random_state=0).fit_predict(features)
    assert found["k-means accuracy"] == pytest.approx(max((clusters == labels).mean(), (clusters != labels).mean()))


def test_clusters_of_several_classes_are_matched_with_the_best_class_each():
    labels = np.arange(300) % 3
    features = np.eye(8, dtype=np.float32)[(labels + 1) % 3] * 9 + noise(300, 8)[0]
    assert published_measures(features, labels)["k-means accuracy"] > 0.99


def test_the_worst_adapter_counts():
    quiet, labels = noise()
    loud = quiet + 4 * labels[:, None].astype(np.float32)
    both = worst_adapter(np.stack([quiet, loud]), labels)
    assert both == {name: max(published_measures(each, labels)[name] for each in (quiet, loud)) for name in PUBLISHED}
