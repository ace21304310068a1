"""The attacks on labels. Each says what it observes and what it needs to know, and is registered under its name.

| observes | is given | yields |
|---|---|---|
| vectors | one channel's vectors, one for each text (`Channel`) | scores |
| shares | all shares of one gradient that met (`(m, n, B, d)`) | further channels: vectors for the B texts |
| updates | consecutive adapters with the texts between, and the model (`Update`, `Jacobian`) | further channels |

`catalogue` lists all of them with what they observe, which labels they know, and what else they need.

Attacks on shares and updates reconstruct what a defence meant to hide. What they yield is a channel like any other,
which the attacks on vectors then score. Operators that collude observe the same kinds, only more of them
(`blindtune.audit.join_views`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from blindtune.audit.observe import Features, Row, Update
from blindtune.audit.recompute import Jacobian
from blindtune.audit.statistics import Labels, Scores

Knowledge = Literal["nothing", "which component", "16 labels", "64 labels", "256 labels", "all other labels"]
Observes = Literal[
    "one channel",
    "one gradient channel",
    "any share",
    "shares that met",
    "consecutive adapters",
    "all adapters since the first step",
]
Needs = Literal["the model", "the texts of each step", "Adam's β", "how shares are made"]
"""Beside labels. All of it is public, or what every operator has."""
When = Literal["every look", "some looks", "last look"]
COMPONENTS, MANY_COMPONENTS = 10, 256
"""Found at once: what cheap attacks want, and what probes want."""


@dataclass(frozen=True)
class Channel:
    """What an attack on vectors observes.

    Attributes:
        features: `(N, d)`.
        classes: how many there are; the one thing about labels that everybody is taken to know.
    """

    features: Features
    classes: int = 2
    _leading: dict[int, Scores] = field(default_factory=dict[int, Scores], repr=False, compare=False)

    @cached_property
    def centred(self) -> Scores:
        return self.features.astype(np.float64) - self.features.mean(0, dtype=np.float64)

    def components(self, count: int) -> Scores:
        """Coordinates on the leading principal directions, `(N, min(count, N, d, 256))`, the largest first."""
        size = min(self.centred.shape)  # of the smaller of XᵀX and XXᵀ, whose eigenvectors tell the same
        wanted = min(COMPONENTS if count <= COMPONENTS else MANY_COMPONENTS, size)
        if wanted not in self._leading:
            wide = self.centred.shape[1] > size
            product = self.centred @ self.centred.T if wide else self.centred.T @ self.centred
            values, vectors = eigh(product, subset_by_index=(size - wanted, size - 1))
            scores = vectors * np.sqrt(np.maximum(values, 0.0)) if wide else self.centred @ vectors
            self._leading[wanted] = scores[:, ::-1]
        return self._leading[wanted][:, :count]


AttackFunction = Callable[[Channel, Labels], Scores | None]
"""Scores `(N, S)`, or `(R, N, S)` from R random draws, with NaN for the texts whose label the attacker was given.

Attacks without labels may use S directions, and get an empty array for labels. Attacks with labels give a column for
each class. None: too few texts for this attack.
"""
ShareFunction = Callable[[Features], dict[str, NDArray[np.floating]]]
"""Shares `(m, n, B, d)` -> vectors `(B, k)` for each named channel."""
UpdateFunction = Callable[[Sequence[Update], Callable[[Update], tuple[Jacobian, NDArray[np.float64]]]], "Reconstructed"]
"""Updates, and for each the Jacobian and θ_{t+1} − θ_t `(n, P)` -> vectors and their texts."""
Reconstructed = tuple[Features, list[Row]]


@dataclass(frozen=True)
class Attack:
    """A way to score texts from the vectors of one channel.

    Attributes:
        knows: which labels.
        channels: how the names of the channels begin that it is made for; all if empty.
        when: attacks that cost much are made at some points in time only.
        observes, needs: what it is given, and what else it has to know.
    """

    name: str
    knows: Knowledge
    function: AttackFunction
    channels: tuple[str, ...] = ()
    when: When = "every look"
    observes: Observes = "one channel"
    needs: tuple[Needs, ...] = ()

    @property
    def unsupervised(self) -> bool:
        return self.knows == "nothing"

    @property
    def symmetric(self) -> bool:
        """Whether the attacker can't tell which end of its scores is which class."""
        return self.knows in ("nothing", "which component")

    def fits(self, channel: str) -> bool:
        return not self.channels or channel.startswith(self.channels)

    def run(self, channel: Channel, labels: Labels) -> Scores | None:
        """Scores; `labels (N,)` reach the attack only if it knows some."""
        return self.function(channel, np.empty(0, dtype=np.int64) if self.symmetric else labels)


@dataclass(frozen=True)
class ShareAttack:
    """A way to read a gradient's shares: to reconstruct it, or to test labels if it knows some."""

    function: ShareFunction
    observes: Observes
    needs: tuple[Needs, ...]
    knows: Knowledge = "nothing"


@dataclass(frozen=True)
class UpdateAttack:
    """A way to reconstruct what moved the adapters, without any label."""

    function: UpdateFunction
    observes: Observes
    needs: tuple[Needs, ...]

    @property
    def consecutive(self) -> bool:
        """Whether it needs the first updates of the run, without gaps, not some of them from all over it."""
        return self.observes == "all adapters since the first step"


ATTACKS: dict[str, Attack] = {}
SHARE_ATTACKS: dict[str, ShareAttack] = {}
UPDATE_ATTACKS: dict[str, UpdateAttack] = {}


def attack(
    name: str,
    *,
    knows: Knowledge,
    channels: tuple[str, ...] = (),
    when: When = "every look",
    observes: Observes = "one channel",
    needs: tuple[Needs, ...] = (),
) -> Callable[[AttackFunction], AttackFunction]:
    """Registers an attack that observes the vectors of one channel."""

    def register(function: AttackFunction) -> AttackFunction:
        ATTACKS[name] = Attack(name, knows, function, channels, when, observes, needs)
        return function

    return register


def observes_shares(
    name: str, *, observes: Observes, needs: tuple[Needs, ...], knows: Knowledge = "nothing"
) -> Callable[[ShareFunction], ShareFunction]:
    """Registers an attack that observes the shares of one backward call.

    The function sees no labels. An attack that knows some has a function of its own beside it.
    """

    def register(function: ShareFunction) -> ShareFunction:
        SHARE_ATTACKS[name] = ShareAttack(function, observes, needs, knows)
        return function

    return register


def observes_updates(
    channel: str, *, observes: Observes, needs: tuple[Needs, ...]
) -> Callable[[UpdateFunction], UpdateFunction]:
    """Registers an attack that observes consecutive adapters, and knows no label; its vectors are named `channel`."""

    def register(function: UpdateFunction) -> UpdateFunction:
        UPDATE_ATTACKS[channel] = UpdateAttack(function, observes, needs)
        return function

    return register


@dataclass(frozen=True)
class Declaration:
    """An attack by name: what it observes, which labels it knows, and what else it needs to know."""

    name: str
    observes: Observes
    knows: Knowledge
    needs: tuple[Needs, ...]


def catalogue() -> list[Declaration]:
    """All registered attacks: on vectors, then on shares, then on updates."""
    found = [Declaration(name, a.observes, a.knows, a.needs) for name, a in ATTACKS.items()]
    found += [Declaration(name, a.observes, a.knows, a.needs) for name, a in SHARE_ATTACKS.items()]
    return found + [Declaration(name, a.observes, "nothing", a.needs) for name, a in UPDATE_ATTACKS.items()]
