"""The guarantee in its forms: μ, ε at δ, the best AUC, and bits."""

import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from blindtune.privacy.accountant import (
    PureAccountant,
    allowance,
    auc_bound,
    epsilon,
    gaussian_guarantee,
    mean_advantage,
    mu_of,
)


@pytest.mark.parametrize("mu", [0.1, 0.25, 1.0, 2.55])
def test_epsilon_is_that_of_another_accountant(mu):
    """Google's dp-accounting, which composes privacy loss distributions: ten Gaussian mechanisms of μ / √10 each."""
    one = privacy_loss_distribution.from_gaussian_mechanism(
        math.sqrt(10) / mu, sensitivity=1.0, value_discretization_interval=1e-4
    )
    assert epsilon(mu, 1e-5) == pytest.approx(one.self_compose(10).get_epsilon_for_delta(1e-5), rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("steps", [4, 100])
def test_discrete_gaussians_compose_as_gaussians_do(steps):
    """The mechanism that is really used, on integers: five messages of one step each."""
    one = privacy_loss_distribution.from_discrete_gaussian_mechanism(
        float(steps), sensitivity=1, value_discretization_interval=1e-4
    )
    found = one.self_compose(5).get_epsilon_for_delta(1e-3)
    assert found == pytest.approx(epsilon(math.sqrt(5) / steps, 1e-3), rel=0.02, abs=1e-3)


def test_a_guarantee_has_all_its_forms():
    found = gaussian_guarantee(0.25)
    assert (found.mu, found.delta) == (0.25, 1e-5)
    assert found.epsilon == pytest.approx(0.9263, abs=1e-4)
    assert found.auc_bound == pytest.approx(0.5702, abs=1e-4)
    assert found.bits == pytest.approx(0.25**2 / 8 / math.log(2))
    assert found.report("x_")["x_epsilon"] == found.epsilon
    nothing = gaussian_guarantee(math.inf)
    assert (nothing.epsilon, nothing.auc_bound, nothing.bits) == (math.inf, 1.0, math.inf)


def test_the_budget_of_costs_is_that_of_mu():
    assert mu_of(allowance(0.3)) == pytest.approx(0.3)
    assert gaussian_guarantee(0.3).bits == pytest.approx(allowance(0.3) / 2 / math.log(2))


def test_two_labelings_are_as_far_apart_as_the_budget_says_and_no_further():
    """The worst case: two labelings whose messages are opposite and each cost the whole budget A."""
    rng, budget = np.random.default_rng(0), allowance(0.8)
    cost = budget / 16
    means = np.full(16, math.sqrt(cost))
    seen = rng.normal(size=(2, 20_000, 16)) + np.stack([means, -means])[:, None]
    auc = roc_auc_score(np.repeat([0, 1], 20_000), -(seen @ means).ravel())
    assert auc == pytest.approx(auc_bound(0.8), abs=0.01)


def test_randomised_response_has_the_same_forms_where_they_exist():
    found = PureAccountant(1.0).guarantee()
    assert (found.epsilon, found.delta, found.mu, found.bits) == (1.0, 0.0, None, None)
    assert set(found.report()) == {"epsilon", "delta", "auc_bound"}
    truth = 1 / (1 + math.exp(-1.0))  # the answer is true so often, and that is all that can be known
    assert found.auc_bound == pytest.approx(truth)


@pytest.mark.parametrize("eps", [0.1, 1.0, 4.0])
def test_randomised_response_is_as_private_as_some_gaussian_mechanism(eps):
    """No test of its answer is better than one of N(0, 1) against N(μ, 1); a smaller μ would be too small."""
    mu = PureAccountant(eps).mu

    def gaussian(alpha):
        return norm.cdf(norm.isf(alpha) - mu)

    alphas = np.linspace(0, 1, 1001)[1:-1]
    pure = np.maximum.reduce([np.zeros_like(alphas), 1 - math.exp(eps) * alphas, math.exp(-eps) * (1 - alphas)])
    assert (gaussian(alphas) <= pure + 1e-12).all()
    fixed = 1 / (1 + math.exp(eps))
    assert gaussian(fixed) == pytest.approx(fixed)


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


@pytest.mark.parametrize(("mu", "delta"), [(-1.0, 0.1), (1.0, 0.0), (1.0, 1.0)])
def test_impossible_numbers_are_refused(mu, delta):
    with pytest.raises(ValueError, match="delta between"):
        epsilon(mu, delta)


class TestMeanAdvantage:
    def test_is_that_of_all_labels_sharing_what_was_told(self):
        assert mean_advantage(0.0, 1000) == 0.0
        assert mean_advantage(math.log(2.0), 4800) == pytest.approx(0.0085, abs=1e-4)
        assert mean_advantage(0.1, 100) == pytest.approx(2 * mean_advantage(0.1, 400))
        assert mean_advantage(100.0, 10) == mean_advantage(0.1, 0) == mean_advantage(math.inf, 10) == 1.0

    @pytest.mark.parametrize("effect", [0.1, 0.5, 1.5])
    def test_is_not_exceeded_by_an_attacker_who_sees_every_label_under_noise(self, effect):
        """y ± 1 seen as N(y · effect / 2, 1): at most effect² / 8 nats each (its divergence from the noise alone)."""
        rng = np.random.default_rng(0)
        labels = rng.choice([-1, 1], 200_000)
        guesses = np.sign(labels * effect / 2 + rng.normal(0, 1, len(labels)))
        advantage = (guesses == labels).mean() - 0.5
        bound = mean_advantage(len(labels) * effect**2 / 8, len(labels))
        assert 0.7 * bound < advantage <= bound

    def test_is_not_exceeded_by_an_attacker_who_learns_one_label_and_nothing_of_the_others(self):
        for labels in (1, 10, 1000):
            assert 0.5 / labels <= mean_advantage(math.log(2.0), labels)
