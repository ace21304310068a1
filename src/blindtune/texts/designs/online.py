"""Online: trains both ends through the provider's trunk.

In every step the client sends s_A and g_B, and receives s_B and g_A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from blindtune.texts.designs.base import BothEnds, design


@design
@dataclass
class Online(BothEnds):
    """Trains both ends through the provider's trunk. Without decorrelation and noise it is plain split learning."""

    name: ClassVar[str] = "online"

    def exposure(self, epochs: int) -> str:
        weight = self.decorrelation_weight
        defence = f", decorrelated with weight {weight:g}" if weight else ": it can read the texts"
        return f"{self._hidden_states_seen(epochs)}, and gradients, in every step{defence}"
