"""Computes which operator takes part in which steps of a run.

Shares of one gradient are sent to different operators, and so are the two adapters under one pad. If there are more
operators than one step needs, they take turns, so that none sees consecutive steps (P3EFT, section 3.2): consecutive
adapters in the clear reveal the update between them, and so the gradient that shares hide
(`blindtune.audit.labels.adam`). Taking turns alone doesn't help: the change over two steps still contains the gradient
of the step in which an operator took part (docs/labels/results.md has numbers). Noise on adapters (`adapter_noise`)
does help, and, for the first steps, random Adam moments.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from blindtune.client import Channel

MAX_STEPS = 1000
"""Maximum number of steps that are examined. The operators' turns repeat after far fewer steps."""


@dataclass(frozen=True)
class Part:
    """Describes in which steps of a run one operator takes part.

    Attributes:
        share: fraction of the steps in which it takes part.
        consecutive: whether it takes part in any two consecutive steps.
        adapters: whether it is sent adapters in any step. If not, it is sent shares of gradients alone.
        predictions: whether it is sent adapters when the client validates or predicts.
    """

    share: float
    consecutive: bool
    adapters: bool
    predictions: bool

    def __str__(self) -> str:
        if self.share == 0:
            return "in no training step"
        if self.share == 1:
            return "in every step, so in consecutive ones" if self.consecutive else "in the only step"
        turns = "some of them consecutive" if self.consecutive else "never in consecutive ones"
        return f"in {self.share:.0%} of the steps, {turns}"


def placement(channel: Channel, operators: int, steps: int) -> list[Part]:
    """Returns the part of each of `operators` operators in a run of `steps` steps."""
    counted = range(min(steps, MAX_STEPS))
    chosen = [set(channel.choose(operators, step)) for step in counted]
    holders = {operator for step in counted for operator in channel.holders(operators, step)}
    teams = {operator for team in channel.teams(operators) for operator in team}
    return [
        Part(
            sum(operator in step for step in chosen) / len(chosen),
            any(operator in step and operator in following for step, following in itertools.pairwise(chosen)),
            operator in holders,
            operator in teams,
        )
        for operator in range(operators)
    ]


def listed(items: Sequence[str]) -> str:
    """Returns the items as an English list: `a`, `a and b`, or `a, b, and c`."""
    *others, last = items
    return f"{', '.join(others)}{',' if others[1:] else ''} and {last}" if others else last
