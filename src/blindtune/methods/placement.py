"""Which operator takes part in which steps: printed before training, so that everybody knows what each will see.

Shares of one gradient, and the two adapters under one pad, go to different operators. Where there are more operators
than one step needs, they take turns, so that none sees consecutive steps (P3EFT, section 3.2): consecutive adapters in
the clear tell the update between them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from blindtune.client import Channel

ENOUGH = 1000
"""Steps to look at: turns repeat long before."""


@dataclass(frozen=True)
class Part:
    """One operator's part in a run.

    Attributes:
        share: of all steps.
        consecutive: whether it ever takes part in two steps that follow each other.
    """

    share: float
    consecutive: bool

    def __str__(self) -> str:
        if self.share == 0:
            return "in no training step"
        turns = "in every step" if self.share == 1 else f"in {self.share:.0%} of the steps"
        return turns + ("" if self.consecutive else ", never in two that follow each other")


def placement(channel: Channel, operators: int, steps: int) -> list[Part]:
    """The part of each of so many operators in a run of so many steps."""
    chosen = [set(channel.choose(operators, step)) for step in range(min(steps, ENOUGH))]
    return [
        Part(
            sum(operator in step for step in chosen) / len(chosen),
            any(operator in now and operator in after for now, after in itertools.pairwise(chosen)),
        )
        for operator in range(operators)
    ]
