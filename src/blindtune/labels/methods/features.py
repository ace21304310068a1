"""Features: a classifier on the frozen model's hidden states. Nothing that is sent depends on labels.

Each text is sent once, to one operator, which returns the pooled states of the layers that the backbone reads out. The
client chooses layers and a classifier by cross-validation (`blindtune.labels.classifiers`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from blindtune.client import Backbone
from blindtune.errors import ConfigError
from blindtune.labels.classifiers import Choice, Kind, choose, layer_groups
from blindtune.labels.methods.base import FrozenMethod, method
from blindtune.models.tokenizer import TokenRow
from blindtune.privacy.randomness import SecureGenerator


@method
@dataclass
class Features(FrozenMethod):
    """Fits a classifier on frozen states of one, some or all layers: operators see texts, and zero bits about labels.

    A method that sends label-dependent messages has to beat it.

    Args:
        layers: `last`, `upper` or `all` of the layers that the backbone reads out, or `choose` for the best of them by
            cross-validation.
        classifier: `logistic`, `rbf` (kernel ridge regression), `mlp`, or `choose`.
    Raises:
        ConfigError: there are no such layers, or no such classifier.
    """

    layers: Literal["choose", "last", "upper", "all"] = "choose"
    classifier: Literal["choose", "logistic", "rbf", "mlp"] = "choose"

    name: ClassVar[str] = "features"
    title: ClassVar[str] = "features"
    reads: ClassVar[Mapping[str, Any]] = {"readout": "all", "pairs": "both"}

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("layers", self.layers, ("choose", "last", "upper", "all")),
            ("classifier", self.classifier, ("choose", *get_args(Kind))),
        ):
            if value not in allowed:
                raise ConfigError(f"There is no {name} = {value!r}.", remedy=f"Use one of: {', '.join(allowed)}.")

    def attach(self, backbone: Backbone, classes: int, generator: SecureGenerator) -> None:
        super().attach(backbone, classes, generator)
        layers, states = backbone.readout.layers, backbone.info.states
        self._groups = layer_groups(layers, states, backbone.pairs, self.layers)
        if not self._groups:
            raise ConfigError(
                f"The readout has none of the {self.layers} layers.", remedy="Use layers=choose, or read all layers."
            )

    def fit_head(self, backbone: Backbone, rows: Sequence[TokenRow], labels: Tensor, classes: int) -> Choice:
        features = self.inputs(backbone, rows)
        kinds: tuple[Kind, ...] = get_args(Kind) if self.classifier == "choose" else (self.classifier,)
        return choose(features, labels, classes, self._groups, backbone.parts, kinds, self.on_progress)
