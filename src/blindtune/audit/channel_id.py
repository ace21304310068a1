"""Identifies a channel, which is what an attack observed, and makes the label that reports show for it.

Only `ChannelId.__str__` makes labels. Code compares fields, never labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum

JOINT, IN_COMMON, SUMMED = "joint", "in common", "summed"
RECOMBINED = "recombined"
OVER_ADAPTERS = frozenset({JOINT, IN_COMMON, SUMMED})
"""Modifiers of channels that combine all adapters. Their labels begin with the plural of the kind."""


class ChannelKind(StrEnum):
    """Lists the kinds of vectors that a channel can hold."""

    ACTIVATION = "activation"
    SHIFT = "shift"
    SENT_ACTIVATION = "sent activation"
    GRADIENT = "gradient"
    UPDATE = "update"


class Control(Enum):
    """Lists the reasons why the labels cannot have influenced a channel."""

    NONE = ""
    FROZEN = "frozen model"
    SHUFFLED = "frozen model, shuffled adapter"


@dataclass(frozen=True)
class ChannelId:
    """Identifies one channel of one server.

    Attributes:
        kind: what the vectors are.
        adapter: index of the adapter in the request; None if the channel combines adapters, or if there is only one.
        modifier: how the vectors were derived, such as `since the first step`.
        share: index of the share; None if the gradient was sent in one piece.
        control: NONE if the vectors may depend on the labels.
    """

    kind: ChannelKind
    adapter: int | None = None
    modifier: str = ""
    share: int | None = None
    control: Control = Control.NONE

    @property
    def is_control(self) -> bool:
        """Returns whether the labels cannot have influenced the vectors."""
        return self.control is not Control.NONE

    def observes(self, *kinds: ChannelKind) -> bool:
        """Returns whether the channel is of one of these kinds and is not a control."""
        return not self.is_control and self.kind in kinds

    def __str__(self) -> str:
        if self == FROZEN_MODEL:
            return self.control.value
        plural = "s" if self.modifier in OVER_ADAPTERS else ""
        adapter = "" if self.adapter is None else f" {self.adapter}"
        modifier = f" {self.modifier}" if self.modifier else ""
        share = "" if self.share is None else f".{self.share}"
        control = f"{self.control.value}: " if self.is_control else ""
        return f"{control}{self.kind}{plural}{adapter}{modifier}{share}"


FROZEN_MODEL = ChannelId(ChannelKind.ACTIVATION, control=Control.FROZEN)
"""Activations of the pretrained model without any adapter."""
