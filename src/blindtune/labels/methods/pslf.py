"""PSLF (Wan et al. 2023): the adapters are trained on randomised labels, the head that predicts on true labels.

    L = task(head(stop_gradient(h)), y) + task(auxiliary(h), ỹ)

ỹ are labels randomised as in `blindtune.labels.methods.randomized_response`, once for each example. Adapters get
gradients from the second term alone, so ε bounds what operators learn, as it does there. Only the head uses true
labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from blindtune.client import Backbone
from blindtune.files import under
from blindtune.labels.head import LinearHead
from blindtune.labels.methods.base import method
from blindtune.labels.methods.randomized_response import RandomizedResponse
from blindtune.privacy.randomness import SecureGenerator


@method
@dataclass
class PSLF(RandomizedResponse):
    """Trains one adapter on randomised labels, with a linear head of its own, and a second head on true labels.

    See `RandomizedResponse` for what ε covers.

    Args:
        backprop: options for sending gradients, see `AdapterMethod`.
        epsilon: ε of one label.
    Raises:
        ConfigError: ε isn't positive and finite.
    """

    name: ClassVar[str] = "pslf"
    title: ClassVar[str] = "PSLF"
    _auxiliary: LinearHead = field(init=False, repr=False, compare=False)

    def attach(self, backbone: Backbone, classes: int, generator: SecureGenerator) -> None:
        super().attach(backbone, classes, generator)
        self._auxiliary = LinearHead(backbone.hidden_size, classes)  # a new one, which no true label has influenced

    @property
    def auxiliary(self) -> LinearHead:
        return self._auxiliary

    def state_dict(self) -> dict[str, Tensor]:
        weights = self._auxiliary.state_dict()
        return {**super().state_dict(), **{f"auxiliary.{name}": t.detach().clone() for name, t in weights.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        weights = under("auxiliary.", state)
        if weights:
            self._auxiliary.load_state_dict(weights)
