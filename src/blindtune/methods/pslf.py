"""PSLF (Wan et al. 2023): adapters learn from flipped labels, the head that predicts from true ones.

    L = task(head(stop_gradient(h)), y) + task(auxiliary(h), ỹ)

ỹ are randomised labels as in `blindtune.methods.randomized_response`, drawn once for each example. Adapters get
gradients from the second term alone, so ε bounds what operators learn, as there; true labels stay with the head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from blindtune.client import Backbone
from blindtune.methods.head import LinearHead
from blindtune.methods.randomized_response import RandomizedResponse
from blindtune.methods.state import under
from blindtune.privacy.randomness import SecureGenerator


@dataclass
class PSLF(RandomizedResponse):
    """One adapter trained on randomised labels through a linear head of its own, and a head trained on true labels.

    What ε covers is said at `RandomizedResponse`.

    Args:
        epsilon: ε of one label.
    Raises:
        ConfigError: ε that isn't positive and finite.
    """

    name: ClassVar[str] = "pslf"
    _auxiliary: LinearHead = field(init=False, repr=False)

    def attach(self, backbone: Backbone, classes: int, generator: SecureGenerator) -> None:
        super().attach(backbone, classes, generator)
        self._auxiliary = LinearHead(backbone.hidden_size, classes)  # new: no trace of true labels

    @property
    def auxiliary(self) -> LinearHead:
        return self._auxiliary

    def state(self) -> dict[str, Tensor]:
        weights = self._auxiliary.state_dict()
        return {**super().state(), **{f"auxiliary.{name}": t.detach().clone() for name, t in weights.items()}}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        weights = under("auxiliary.", state)
        if weights:
            self._auxiliary.load_state_dict(weights)
