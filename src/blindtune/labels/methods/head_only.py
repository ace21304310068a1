"""Head only: trains a head on the frozen model's features, without adapters. Each text is sent once, and nothing about
labels leaves the client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from blindtune.labels.methods.base import Method, method
from blindtune.labels.placement import Part


@method
@dataclass
class HeadOnly(Method):
    """Trains the head alone, with perfect label privacy: servers see texts and nothing else.

    It is the baseline for accuracy: a method that trains adapters has to exceed it.
    """

    name: ClassVar[str] = "head-only"
    title: ClassVar[str] = "frozen"

    @property
    def num_adapters(self) -> int:
        return 0

    @property
    def label_mu(self) -> float:
        return 0.0

    def exposure(self, part: Part, operators: int, *, random_adam_moments: float = 0.0) -> str:
        return "sees texts, each once: nothing about labels"
