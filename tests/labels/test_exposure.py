"""Who takes part in which steps, and what that tells them."""

from types import SimpleNamespace

import pytest

from blindtune.client import PlainChannel
from blindtune.labels import METHODS, PrivateBackprop, PrivateBackpropOptions, exposure, make_method
from blindtune.labels.placement import placement
from blindtune.privacy.randomness import SecureGenerator
from blindtune.wire import Limits, Readout


def shares(m, adapters=1):
    return PrivateBackprop(PrivateBackpropOptions(m), SecureGenerator(bytes(32)), adapters=adapters)


def test_two_operators_with_two_shares_see_every_step():
    parts = placement(shares(2), 2, 50)
    assert [(part.share, part.consecutive) for part in parts] == [(1.0, True), (1.0, True)]
    assert str(parts[0]) == "in every step, so in consecutive ones"


def test_pairs_take_turns_where_there_are_four():
    parts = placement(shares(2), 4, 50)
    assert [(part.share, part.consecutive) for part in parts] == [(0.5, False)] * 4
    assert str(parts[0]) == "in 50% of the steps, never in consecutive ones"


def test_pairs_of_three_take_turns_that_touch():
    assert str(placement(shares(2), 3, 60)[0]) == "in 67% of the steps, some of them consecutive"
    assert str(placement(shares(2), 3, 1)[0]) == "in the only step"


@pytest.mark.parametrize(("m", "operators"), [(2, 3), (2, 5), (3, 4), (3, 7)])
def test_no_operator_has_two_shares_of_one_gradient_and_all_work_alike(m, operators):
    channel = shares(m)
    for step in range(40):
        assert len(set(channel.choose(operators, step))) == m
    parts = placement(channel, operators, 20 * operators)
    assert len({round(part.share, 6) for part in parts}) == 1


def test_turns_under_plain_lora():
    assert [part.share for part in placement(PlainChannel(), 2, 10)] == [0.5, 0.5]
    assert str(placement(PlainChannel(), 12, 3)[11]) == "in no training step"


@pytest.mark.parametrize(("adapters", "operators"), [(2, 4), (2, 9), (3, 6)])
def test_adapters_have_operators_of_their_own_where_there_are_enough(adapters, operators):
    channel = shares(2, adapters)
    assert channel.apart(operators)
    owned = [set(range(adapter, operators, adapters)) for adapter in range(adapters)]
    for step in range(20):
        chosen = channel.choose(operators, step)
        assert len(set(chosen)) == 2 * adapters
        assert all(len(own.intersection(chosen)) == 2 for own in owned)
    for team in channel.teams(operators):
        assert [sum(operator in own for operator in team) for own in owned] == [1] * adapters
    assert not channel.apart(2 * adapters - 1)
    assert len(channel.choose(2 * adapters - 1, 0)) == 2


def test_adapters_with_pools_of_their_own_take_turns_there():
    parts = placement(shares(2, 2), 8, 40)
    assert [(part.share, part.consecutive) for part in parts] == [(0.5, False)] * 8


def told(
    name: str, operators: int, *, random_adam_moments: float = 0.0, steps: int = 60, **options: object
) -> list[str]:
    """What each of so many operators is told about a run, without its address."""
    method = make_method(name, options)
    pool = SimpleNamespace(
        operators=[SimpleNamespace(transport=SimpleNamespace(url=f"https://{o}.example")) for o in range(operators)]
    )
    info = SimpleNamespace(
        name="m", states=4, hidden_size=16, model_type="bert", modules={"layer.2.query": (16, 16)}, limits=Limits()
    )
    readout = Readout(pooling="mean")
    backbone = SimpleNamespace(
        hidden_size=8, pool=pool, channel=PlainChannel(), readout=readout, info=info, pairs="joint"
    )
    method.attach(backbone, 2, SecureGenerator(bytes(32)))
    lines = exposure(SimpleNamespace(method=method, backbone=backbone), steps, random_adam_moments=random_adam_moments)
    for index, line in enumerate(lines):
        assert line.startswith(f"operator {index}: https://{index}.example  sees texts")
    return [line.partition("  ")[2] for line in lines]


INVERSION = "consecutive adapters can tell each step's gradient (optimizer inversion), and so the labels"


class TestExposure:
    @pytest.mark.parametrize("name", METHODS)
    def test_says_for_every_method_what_can_be_learned_and_whether_steps_are_consecutive(self, name):
        for said in told(name, 2):
            sees, _, learns = said.partition(": ")
            assert learns
            assert ("consecutive" in sees) == (name not in ("features", "side", "tangent-sketch"))

    def test_gradients_in_the_clear_tell_what_the_adapter_learns_from(self):
        for name in ("lora", "distance-correlation"):
            [said] = told(name, 1)
            assert said.startswith("sees texts, the adapter, and gradients, in every step, so in consecutive ones: ")
            assert said.endswith("it can learn the labels from gradients")
        for name in ("pslf", "randomized-response"):
            assert told(name, 2, epsilon=0.5)[1].endswith(
                "it can learn only labels that were randomised with epsilon 0.5, delta 0 from gradients"
            )

    @pytest.mark.parametrize(
        ("name", "activations"),
        [
            ("lora", "activations and shifts carry the labels;"),
            ("distance-correlation", "activations and shifts carry the labels as far as the penalty lets them;"),
            ("p3eft", "activations and shifts carry the labels as far as the adversary lets them;"),
        ],
    )
    def test_shares_hide_gradients_that_consecutive_adapters_tell(self, name, activations):
        assert all("one share of each gradient" in said for said in told(name, 2, m=2))
        for said in told(name, 2, m=2):
            assert f": {activations}" in said
            assert said.endswith(f"{INVERSION}, although shares hide it")
        for said in told(name, 2, m=2, random_adam_moments=0.1):
            assert said.endswith(f"{INVERSION}, although shares hide it; not the first steps': random Adam moments")
        for said in told(name, 8 if name == "p3eft" else 4, m=2):
            assert "never in consecutive ones" in said
            assert INVERSION not in said
            assert said.endswith("holds their gradients (optimizer inversion), and so the labels")
        for said in told(name, 2, m=2, adapter_noise=0.01):
            assert INVERSION not in said
            assert said.endswith("noise of 0.01 on adapters hides what a step changed, if it is large enough")

    def test_weights_of_zero_leave_activations_alone(self):
        assert "carry the labels;" in told("distance-correlation", 2, m=2, activation_weight=0)[0]
        assert "carry the labels;" in told("p3eft", 2, activation_weight=0)[0]

    def test_randomised_labels_are_all_that_shares_and_adapters_are_about(self):
        for said in told("pslf", 2, m=2):
            assert "carry only labels that were randomised with epsilon 1, delta 0;" in said
            assert "(optimizer inversion), and so those labels" in said

    def test_adapters_with_operators_of_their_own(self):
        assert all("sees texts, all 2 adapters, and one share" in said for said in told("p3eft", 3))
        assert all("sees texts, one of 2 adapters (always the same), and one share" in s for s in told("p3eft", 4))

    @pytest.mark.parametrize("operators", [2, 3])
    def test_padded_adapters_and_shares_have_one_bound(self, operators):
        for said in told("padded-lora", operators, max_mu=0.1):
            assert said.startswith("sees texts, one adapter under a pad, and one share of each gradient, in ")
            assert said.endswith(
                ": all that it sees of the run is μ-differentially private in all labels with μ = 0.1, so ε = 0.34 at "
                "δ = 1e-05: no test of one label has an AUC above 0.528"
            )

    def test_only_two_of_three_operators_get_a_padded_adapter(self):
        """With three shares, the third one's gradient is taken where the adapter is zero."""
        first, second, third = told("padded-lora", 3, m=3)
        assert "one adapter under a pad" in first
        assert "one adapter under a pad" in second
        assert third == (
            "sees texts and one share of each gradient, in every step, so in consecutive ones: all that it sees of "
            "the run is μ-differentially private in all labels with μ = 0.25, so ε = 0.93 at δ = 1e-05: no test of one "
            "label has an AUC above 0.570"
        )
        later = told("padded-lora", 6, m=3)
        assert "one adapter under a pad where you validate or predict: all that it sees" in later[2]
        assert all("adapter under a pad, and one share" in said for said in told("padded-lora", 4, m=3))

    @pytest.mark.parametrize("name", ["lora", "padded-lora", "p3eft"])
    def test_shares_that_meet_hide_nothing(self, name):
        [said] = told(name, 1, m=2, allow_single_operator=True)
        assert ("both padded adapters, and every share" if name == "padded-lora" else "every share") in said
        assert said.endswith("it can learn the labels from gradients: their shares meet here")

    def test_operators_that_are_not_needed(self):
        said = told("lora", 12, m=2, steps=3)[11]
        assert said.startswith("sees texts, in no training step, the adapter where you validate or predict: ")
        assert said.endswith("activations and shifts carry the labels")
        assert told("padded-lora", 3, steps=1)[2] == "sees texts, in no training step: nothing about labels"

    def test_without_adapters_nothing_depends_on_labels(self):
        assert told("features", 1) == ["sees texts, each once: nothing about labels"]
        assert told("tangent-sketch", 1) == ["sees texts, with 32 public directions: nothing about labels"]
