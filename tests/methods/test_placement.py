"""Who takes part in which steps."""

import pytest

from blindtune.client import PlainChannel
from blindtune.methods import SharedGradients
from blindtune.methods.placement import placement
from blindtune.privacy.randomness import SecureGenerator


def shares(m, adapters=1):
    return SharedGradients(m, 1.0, 100.0, SecureGenerator(bytes(32)), adapters=adapters)


def test_two_operators_with_two_shares_see_every_step():
    parts = placement(shares(2), 2, 50)
    assert [(part.share, part.consecutive) for part in parts] == [(1.0, True), (1.0, True)]
    assert str(parts[0]) == "in every step"


def test_pairs_take_turns_where_there_are_four():
    parts = placement(shares(2), 4, 50)
    assert [(part.share, part.consecutive) for part in parts] == [(0.5, False)] * 4
    assert str(parts[0]) == "in 50% of the steps, never in two that follow each other"


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
