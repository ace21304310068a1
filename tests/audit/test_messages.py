"""When a call happened, and which shares belong to one gradient, whatever clocks and teams of operators do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from blindtune.audit.messages import Message, call_steps, share_groups

BASE = ("base",)
BATCHES = (((1, 2), (3,)), ((4,), (5, 6)), ((7,), (8,)), ((9,), (10,)), ((11,), (12,)), ((13,), (14,)))


def call(time: float, operator: str, adapters: tuple[str, ...], batch: int, share: float | None = None) -> Message:
    """A backward call if it has a share, a vector of this one value."""
    rows = BATCHES[batch]
    vectors = None if share is None else np.full((1, len(adapters), len(rows), 3), share, dtype=np.float32)
    return Message(time, "forward" if share is None else "backward", adapters, rows, rows, vectors, operator)


def padded_step(step: int, batch: int, team: str) -> list[Message]:
    """Adapters of its own for each operator of the team; then a share for each at the base: 100·step, 100·step + 1 …"""
    time = 10.0 * step
    forward = [call(time + 0.1 * j, name, (f"{step}{name}",), batch) for j, name in enumerate(team)]
    backward = [call(time + 1 + 0.1 * j, name, BASE, batch, 100.0 * step + j) for j, name in enumerate(team)]
    return [*forward, *backward]


def padded_run(steps: int, batches: int, teams: tuple[str, ...] = ("AB",)) -> list[Message]:
    return [m for step in range(steps) for m in padded_step(step, step % batches, teams[step % len(teams)])]


def values(calls: list[Message]) -> list[list[float]]:
    """The shares of each gradient, in the order of time."""
    ordered = sorted(calls, key=lambda message: message.time)
    return [sorted(group.shares[:, 0, 0, 0].tolist()) for group in share_groups(ordered)[0]]


def expected(steps: int, m: int = 2) -> list[list[float]]:
    return [[100.0 * step + j for j in range(m)] for step in range(steps)]


def late(calls: list[Message], operator: str, seconds: float) -> list[Message]:
    """As if this operator's clock were ahead."""
    return [replace(m, time=m.time + seconds) if m.operator == operator else m for m in calls]


def test_a_call_with_older_adapters_happens_at_the_current_step():
    calls = [call(0, "A", (), 0), call(1, "A", ("x",), 0), call(2, "A", BASE, 0), call(3, "A", ("y",), 1)]
    calls += [call(4, "A", BASE, 1), call(5, "A", (), 2), call(6, "A", ("x",), 2)]
    assert call_steps(calls) == [0, 0, 1, 2, 2, 2, 2]


def test_one_operator_has_one_gradient_for_each_epoch():
    alone = [m for m in padded_run(12, 4) if m.operator == "A"]
    assert values(alone) == expected(12, 1)


@pytest.mark.parametrize("batches", [1, 2, 4])
def test_shares_of_a_step_are_grouped_and_those_of_another_epoch_are_not(batches):
    assert values(padded_run(12, batches)) == expected(12)


def test_answers_may_take_any_time_between_two_steps():
    """B's share is nearer in time to A's next one than to its own partner, but new adapters lie between."""
    calls = [replace(m, time=m.time + 8) if m.operator == "B" and m.kind == "backward" else m for m in padded_run(6, 1)]
    assert values(calls) == expected(6)


@pytest.mark.parametrize("seconds", [-19, -3, 12, 19])
def test_clocks_may_differ_by_two_steps(seconds):
    calls = late(padded_run(18, 6), "B", seconds)
    assert sorted(values(calls)) == expected(18)


def test_a_message_that_one_operator_lost_takes_no_other_one_away():
    calls = [m for m in padded_run(12, 6) if not (m.operator == "A" and m.time < 10)]
    assert sorted(values(calls)) == [[1.0], *expected(12)[1:]]


@pytest.mark.parametrize("teams", [("AB", "CA", "BC"), ("AB", "CD")])
def test_teams_may_change(teams):
    """Each batch is seen by different teams in different epochs."""
    assert values(padded_run(18, 5, teams)) == expected(18)


def test_a_message_that_is_sent_again_adds_nothing():
    calls = padded_run(6, 3)
    again = replace(calls[3], time=100.0)  # after new adapters, as a client does that resumes from a checkpoint
    assert values([*calls, again]) == expected(6)


def test_shares_under_adapters_that_are_trained_are_grouped_however_much_clocks_differ():
    calls: list[Message] = []
    for step in range(6):
        for j, name in enumerate("AB"):
            calls.append(call(10.0 * step + j, name, (f"theta {step}",), step))
            calls.append(call(10.0 * step + 2 + j, name, (f"theta {step}",), step, 100.0 * step + j))
    for seconds in (0, 35, 1000):
        assert sorted(values(late(calls, "B", seconds))) == expected(6)
        assert share_groups(calls)[1] == set()


def test_all_shares_that_one_operator_gets_within_a_step_are_of_one_gradient():
    calls = [call(0, "A", ("x",), 0), call(1, "A", ("x",), 0, 1.0), call(2, "A", ("x",), 1, 3.0)]
    calls += [call(3, "A", ("x",), 0, 2.0), call(4, "A", ("y",), 0), call(5, "A", ("y",), 0, 4.0)]
    assert sorted(values(calls)) == [[1.0, 2.0], [3.0], [4.0]]


def test_adapters_are_fixed_if_gradients_come_under_them_at_several_steps():
    assert share_groups(padded_run(3, 3))[1] == {BASE}
    accumulated = [call(0, "A", ("x",), 0, 1.0), call(1, "A", ("x",), 1, 2.0), call(2, "A", ("y",), 2, 3.0)]
    assert share_groups(accumulated)[1] == set()
