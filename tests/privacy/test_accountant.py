"""μ-GDP of the gradient channel."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from blindtune.privacy.accountant import Accountant, auc_bound, epsilon, gaussian_mu


def test_mu_grows_with_the_square_root_of_the_views_of_one_example():
    accountant = Accountant(clip_norm=1.0, sigma=1000.0)
    for _ in range(4):
        accountant.record(0, ["a", "b"])
    accountant.record(1, ["a"])
    assert accountant.views() == 4
    assert accountant.mu() == pytest.approx(2 * 2 / 1000)


def test_views_at_two_operators_do_not_add_up():
    accountant = Accountant(1.0, 10.0)
    accountant.record(0, ["a"])
    accountant.record(1, ["a"])
    assert accountant.views() == 1


def test_a_step_can_be_priced_before_it_is_taken():
    accountant = Accountant(1.0, 10.0)
    accountant.record(0, ["a", "b"])
    for operator, examples in ((0, ["c"]), (0, ["a", "c"]), (1, ["a"]), (1, ["d", "d", "d"])):
        price = accountant.mu_after(operator, examples)
        again = Accountant(1.0, 10.0)
        again.load_state(accountant.state())
        again.record(operator, examples)
        assert price == again.mu()


def test_state_survives_a_checkpoint():
    accountant, again = Accountant(1.0, 10.0), Accountant(1.0, 10.0)
    accountant.record(3, ["x", "y"])
    again.load_state(accountant.state())
    again.record(3, ["x"])
    assert again.views() == 2


def test_epsilon_agrees_with_the_definition_of_gdp():
    """At the returned ε, the trade-off of N(0, 1) against N(μ, 1) spends exactly δ (Monte Carlo)."""
    mu, delta = 1.0, 1e-2
    eps = epsilon(mu, delta)
    sample = np.random.default_rng(0).normal(mu, 1, 2_000_000)
    loss = mu * sample - mu**2 / 2
    assert np.maximum(0, 1 - np.exp(eps - loss)).mean() == pytest.approx(delta, rel=0.05)


def test_epsilon_is_zero_for_nothing_and_grows_with_mu():
    assert epsilon(0.0, 1e-5) == 0.0
    values = [epsilon(mu, 1e-5) for mu in (0.01, 0.1, 1.0, 5.0)]
    assert values == sorted(values)
    assert values[-1] > 10


def test_the_bound_is_the_auc_of_the_best_test():
    rng = np.random.default_rng(0)
    mu = 0.7
    scores = np.concatenate([rng.normal(0, 1, 20_000), rng.normal(mu, 1, 20_000)])
    assert auc_bound(mu) == pytest.approx(roc_auc_score(np.repeat([0, 1], 20_000), scores), abs=0.01)


def test_no_view_gives_no_mu():
    assert Accountant(1.0, 1.0).mu() == 0.0
    assert gaussian_mu(1.0, 2.0, 1) == 1.0


@pytest.mark.parametrize(("mu", "delta"), [(-1.0, 0.1), (1.0, 0.0), (1.0, 1.0)])
def test_impossible_numbers_are_refused(mu, delta):
    with pytest.raises(ValueError, match="delta between"):
        epsilon(mu, delta)
