"""Registers attacks on labels. Each attack declares what it observes and what it needs to know.

| attack on | input | output |
|---|---|---|
| vectors | the vectors of one channel, one for each text (`Channel`) | scores |
| shares | all received shares of one gradient, `(m, n, B, d)` | further channels: vectors for the B texts |
| updates | consecutive adapters with the texts between them, and the model (`Update`, `Jacobian`) | further channels |

`catalogue` lists all attacks with what they observe, which labels they know, and what else they need.

Attacks on shares and updates reconstruct what a defence hides. Their output is a channel like any other, and the
attacks on vectors score it. Operators that collude observe the same kinds of input, but more of it
(`blindtune.audit.join_views`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from blindtune.audit.channel_id import ChannelId, ChannelKind
from blindtune.audit.observe import Features, Row, Update
from blindtune.audit.recompute import Jacobian
from blindtune.audit.statistics import Labels, Scores

Observes = Literal[
    "one channel",
    "one gradient channel",
    "any share",
    "shares that met",
    "consecutive adapters",
    "all adapters since the first step",
]
Needs = Literal["the model", "the texts of each step", "Adam's β", "how shares are made"]
"""What an attack needs to know besides labels. All of it is public, or known to every operator."""
When = Literal["every snapshot", "some snapshots", "last snapshot"]
"""At which snapshots an attack runs."""
COMPONENTS, MANY_COMPONENTS = 10, 256
"""Numbers of components that are computed at once: for attacks that use up to ten, and for all others."""


class Knowledge(StrEnum):
    """Lists what an attacker can know about the labels."""

    NOTHING = "nothing"
    WHICH_COMPONENT = "which component"
    LABELS_16 = "16 labels"
    LABELS_64 = "64 labels"
    LABELS_256 = "256 labels"
    ALL_OTHER_LABELS = "all other labels"


@dataclass(frozen=True)
class Channel:
    """Holds the vectors of one channel, the input of an attack on vectors.

    Attributes:
        features: `(N, d)`.
        classes: number of classes. Every attacker is assumed to know it.
    """

    features: Features
    classes: int = 2
    _leading: dict[int, Scores] = field(default_factory=dict[int, Scores], repr=False, compare=False)

    @cached_property
    def centred(self) -> Scores:
        return self.features.astype(np.float64) - self.features.mean(0, dtype=np.float64)

    def components(self, count: int) -> Scores:
        """Returns coordinates on the leading principal directions, `(N, min(count, N, d, 256))`, the largest first."""
        size = min(self.centred.shape)  # the components follow from XᵀX and from XXᵀ; the smaller matrix is cheaper
        wanted = min(COMPONENTS if count <= COMPONENTS else MANY_COMPONENTS, size)
        if wanted not in self._leading:
            wide = self.centred.shape[1] > size
            product = self.centred @ self.centred.T if wide else self.centred.T @ self.centred
            values, vectors = eigh(product, subset_by_index=(size - wanted, size - 1))
            scores = vectors * np.sqrt(np.maximum(values, 0.0)) if wide else self.centred @ vectors
            self._leading[wanted] = scores[:, ::-1]
        return self._leading[wanted][:, :count]


AttackFunction = Callable[[Channel, Labels], Scores | None]
"""Returns scores `(N, S)`, or `(R, N, S)` from R random draws, with NaN for the texts whose label the attacker knows.

Attacks without labels may return S directions, and get an empty array for labels. Attacks with labels return a column
for each class. An attack returns None if there are too few texts.
"""
ShareFunction = Callable[[Features], dict[ChannelId, NDArray[np.floating]]]
"""Takes shares `(m, n, B, d)`, and returns vectors `(B, k)` for each channel."""
UpdateFunction = Callable[[Sequence[Update], Callable[[Update], tuple[Jacobian, NDArray[np.float64]]]], "Reconstructed"]
"""Takes updates and a function from an update to its Jacobian and θ_{t+1} − θ_t `(n, P)`. Returns vectors and texts."""
Reconstructed = tuple[Features, list[Row]]


@dataclass(frozen=True)
class Attack:
    """Scores texts from the vectors of one channel.

    Attributes:
        knows: which labels the attacker knows.
        kinds: the kinds of channels that the attack runs on; if empty, it runs on all channels, controls included.
        when: at which snapshots the attack runs. Expensive attacks run at some snapshots only.
        observes: what the attack is given.
        needs: what the attacker has to know besides labels.
    """

    name: str
    knows: Knowledge
    function: AttackFunction
    kinds: tuple[ChannelKind, ...] = ()
    when: When = "every snapshot"
    observes: Observes = "one channel"
    needs: tuple[Needs, ...] = ()

    @property
    def unsupervised(self) -> bool:
        """Returns whether the attacker knows nothing about labels."""
        return self.knows is Knowledge.NOTHING

    @property
    def symmetric(self) -> bool:
        """Returns whether the attacker doesn't know which class has the high scores."""
        return self.knows in (Knowledge.NOTHING, Knowledge.WHICH_COMPONENT)

    def fits(self, channel: ChannelId) -> bool:
        """Returns whether the attack can run on this channel."""
        return not self.kinds or channel.observes(*self.kinds)

    def run(self, channel: Channel, labels: Labels) -> Scores | None:
        """Returns scores. The function receives `labels (N,)` only if the attacker knows some."""
        return self.function(channel, np.empty(0, dtype=np.int64) if self.symmetric else labels)


@dataclass(frozen=True)
class ShareAttack:
    """Describes an attack on the shares of a gradient.

    It reconstructs the gradient, or tests labels if the attacker knows some.
    """

    function: ShareFunction
    observes: Observes
    needs: tuple[Needs, ...]
    knows: Knowledge = Knowledge.NOTHING


@dataclass(frozen=True)
class UpdateAttack:
    """Describes an attack that reconstructs the gradient of an update without any label.

    Attributes:
        channel: identifies the reconstructed vectors.
    """

    channel: ChannelId
    function: UpdateFunction
    observes: Observes
    needs: tuple[Needs, ...]

    @property
    def consecutive(self) -> bool:
        """Returns whether the attack needs the first updates of the run, without gaps. Others accept any updates."""
        return self.observes == "all adapters since the first step"


ATTACKS: dict[str, Attack] = {}
SHARE_ATTACKS: dict[str, ShareAttack] = {}
UPDATE_ATTACKS: dict[str, UpdateAttack] = {}


def attack(
    name: str,
    *,
    knows: Knowledge,
    kinds: tuple[ChannelKind, ...] = (),
    when: When = "every snapshot",
    observes: Observes = "one channel",
    needs: tuple[Needs, ...] = (),
) -> Callable[[AttackFunction], AttackFunction]:
    """Registers an attack that observes the vectors of one channel."""

    def register(function: AttackFunction) -> AttackFunction:
        ATTACKS[name] = Attack(name, knows, function, kinds, when, observes, needs)
        return function

    return register


def observes_shares(
    name: str, *, observes: Observes, needs: tuple[Needs, ...], knows: Knowledge = Knowledge.NOTHING
) -> Callable[[ShareFunction], ShareFunction]:
    """Registers an attack that observes the shares of one backward call.

    The function receives no labels. An attack that knows some has a second function for them.
    """

    def register(function: ShareFunction) -> ShareFunction:
        SHARE_ATTACKS[name] = ShareAttack(function, observes, needs, knows)
        return function

    return register


def observes_updates(
    channel: ChannelId, *, observes: Observes, needs: tuple[Needs, ...]
) -> Callable[[UpdateFunction], UpdateFunction]:
    """Registers an attack that observes adapters of consecutive steps and knows no label, under `str(channel)`."""

    def register(function: UpdateFunction) -> UpdateFunction:
        UPDATE_ATTACKS[str(channel)] = UpdateAttack(channel, function, observes, needs)
        return function

    return register


@dataclass(frozen=True)
class Declaration:
    """Describes what an attack observes, which labels it knows, and what else it needs to know."""

    name: str
    observes: Observes
    knows: Knowledge
    needs: tuple[Needs, ...]


def catalogue() -> list[Declaration]:
    """Returns all registered attacks: on vectors, then on shares, then on updates."""
    return [
        *(Declaration(name, a.observes, a.knows, a.needs) for name, a in ATTACKS.items()),
        *(Declaration(name, a.observes, a.knows, a.needs) for name, a in SHARE_ATTACKS.items()),
        *(Declaration(name, a.observes, Knowledge.NOTHING, a.needs) for name, a in UPDATE_ATTACKS.items()),
    ]
