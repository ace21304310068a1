"""The attacks on labels. Each says what it needs to know; `attack` registers it under its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from blindtune.audit.observe import Features
from blindtune.audit.statistics import Labels, Scores

Knowledge = Literal["nothing", "which component", "all other labels"]
AttackFunction = Callable[[Features, Labels], Scores]
"""`(features (N, d), labels (N,)) -> scores (N, S)`: higher in one of the S columns means one of the classes.

Attacks that know nothing get labels only to learn how many classes there are."""


@dataclass(frozen=True)
class Attack:
    """A way to score examples from the vectors that one channel gives."""

    name: str
    knows: Knowledge
    run: AttackFunction

    @property
    def unsupervised(self) -> bool:
        return self.knows == "nothing"

    @property
    def symmetric(self) -> bool:
        """Whether the attacker can't tell which end of its scores is which class."""
        return self.knows != "all other labels"


ATTACKS: dict[str, Attack] = {}


def attack(name: str, *, knows: Knowledge) -> Callable[[AttackFunction], AttackFunction]:
    """Registers a function as an attack."""

    def register(function: AttackFunction) -> AttackFunction:
        ATTACKS[name] = Attack(name, knows, function)
        return function

    return register
