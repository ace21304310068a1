"""μ-GDP of the gradient channel, and what all messages can tell together."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from blindtune.errors import CheckpointError
from blindtune.privacy.accountant import (
    Accountant,
    InformationLedger,
    auc_bound,
    epsilon,
    gaussian_mu,
    mean_advantage,
)


def test_mu_grows_with_the_square_root_of_the_views_of_one_example():
    accountant = Accountant(clip_norm=1.0, sigma=1000.0)
    for _ in range(4):
        accountant.record("a", ["a", "b"])
    accountant.record("b", ["a"])
    assert accountant.views() == 4
    assert accountant.mu() == pytest.approx(2 * 2 / 1000)


def test_views_at_two_operators_do_not_add_up():
    accountant = Accountant(1.0, 10.0)
    accountant.record("a", ["a"])
    accountant.record("b", ["a"])
    assert accountant.views() == 1


def test_a_step_can_be_priced_before_it_is_taken():
    accountant = Accountant(1.0, 10.0)
    accountant.record("a", ["a", "b"])
    for operator, examples in (("a", ["c"]), ("a", ["a", "c"]), ("b", ["a"]), ("b", ["d", "d", "d"])):
        price = accountant.mu_after(operator, examples)
        again = Accountant(1.0, 10.0)
        again.load_state(accountant.state())
        again.record(operator, examples)
        assert price == again.mu()


def test_state_survives_a_checkpoint():
    accountant, again = Accountant(1.0, 10.0), Accountant(1.0, 10.0)
    accountant.record("https://c.example", ["x", "y"])
    again.load_state(accountant.state())
    again.record("https://c.example", ["x"])
    assert again.views() == 2


def test_counts_of_servers_by_number_are_refused():
    """Checkpoints once had them: whether the same servers come in the same order now, nobody can tell."""
    state = torch.frombuffer(bytearray(b'{"0": {"a": 3}, "1": {"a": 2}}'), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"by their number.*start anew"):
        Accountant(1.0, 10.0).load_state(state)


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


class TestInformation:
    def test_of_shares_is_what_their_divergence_from_noise_adds_up_to(self):
        """One share: KL(N(g, σ²) || N(0, σ²)) with |g| = C, for each example in it."""
        gradient = torch.tensor([3.0, 4.0])  # C = 5
        noisy, noise = (torch.distributions.Normal(mean, 20.0) for mean in (gradient, torch.zeros(2)))
        each = float(torch.distributions.kl_divergence(noisy, noise).sum())
        accountant = Accountant(clip_norm=5.0, sigma=20.0)
        assert accountant.nats() == 0.0
        accountant.record("a", ["a", "b"])
        accountant.record("a", ["a", "c"])
        accountant.record("b", ["a", "b", "c"])
        assert accountant.nats() == pytest.approx(4 * each)  # operators don't pool what they see
        accountant.record_meeting()
        assert accountant.nats() == math.inf

    def test_equal_messages_count_once_and_operators_apart(self):
        ledger = InformationLedger()
        assert (ledger.nats(), ledger.messages()) == (0.0, 0)
        for operator, message in (("a", "x"), ("b", "x"), ("a", "x"), ("a", "y"), ("b", "x")):
            ledger.record(operator, message, 0.25)
        assert (ledger.nats(), ledger.messages()) == (0.5, 2)

    def test_a_message_can_be_priced_before_it_is_sent(self):
        ledger = InformationLedger()
        ledger.record("a", "x", 0.25)
        for operator, message in (("a", "x"), ("a", "y"), ("b", "x")):
            again = InformationLedger()
            again.load_state(ledger.state())
            price = ledger.after(operator, message, 0.125)
            again.record(operator, message, 0.25 if (operator, message) == ("a", "x") else 0.125)
            assert price == sum(again._seen[operator].values())
        assert ledger.nats() == 0.25, "asking for a price spends nothing"

    def test_survives_a_checkpoint(self):
        ledger, again = InformationLedger(), InformationLedger()
        ledger.record("https://a.example", "ab" * 16, 0.125)
        again.load_state(ledger.state())
        assert again.nats() == 0.125
        again.record("https://a.example", "ab" * 16, 0.125)
        again.record("https://a.example", "cd" * 16, 0.125)
        assert again.nats() == 0.25
        assert ledger.nats() == 0.125

    def test_never_forgets_what_was_sent_when_an_older_count_is_read(self):
        """As when a checkpoint's two files are read one after the other."""
        ledger, older = InformationLedger(), InformationLedger()
        ledger.record("a", "x", 0.25)
        ledger.record("b", "x", 0.25)
        older.record("a", "y", 0.25)
        ledger.load_state(older.state())
        assert (ledger.nats(), ledger.messages()) == (0.5, 2)
        assert ledger.after("b", "x", 0.25) == 0.25

    def test_has_no_bound_where_messages_met_that_had_to_be_apart(self):
        ledger = InformationLedger()
        ledger.met = True
        assert ledger.nats() == math.inf


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
