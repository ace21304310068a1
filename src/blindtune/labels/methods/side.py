"""Side: a small network on the frozen model's token states. Nothing that is sent depends on labels.

The server projects the states of several layers with a public random matrix and sends them in int8, so that a text of
128 tokens costs at most 133 KB, once. The network is trained on the client (`blindtune.labels.side`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from blindtune.checks import check_counts
from blindtune.client import Backbone
from blindtune.errors import ConfigError
from blindtune.labels.classifiers import Candidate, Choice
from blindtune.labels.methods.base import FrozenMethod, method
from blindtune.labels.side import SideHead
from blindtune.models.tokenizer import TokenRow


@method
@dataclass
class Side(FrozenMethod):
    """Trains a small network on token states of several layers: operators see texts, and zero bits about labels.

    Args:
        epochs: number of passes over the training examples.
        width: size of the network's hidden layers.
        head_seed: seed of the network's initial weights and of its batches.
    Raises:
        ConfigError: an option is out of range.
    """

    epochs: int = 8
    width: int = 96
    head_seed: int = 0

    name: ClassVar[str] = "side"
    title: ClassVar[str] = "side network"
    reads: ClassVar[Mapping[str, Any]] = {"readout": "spread", "pooling": "none", "projection": 128, "codec": "int8"}

    def __post_init__(self) -> None:
        check_counts(epochs=self.epochs, width=self.width)

    def check(self, backbone: Backbone) -> None:
        if backbone.pooling != "none":
            raise ConfigError(
                f"The side network reads every token, and the backbone's pooling is {backbone.pooling!r}.",
                remedy="Use pooling='none'.",
            )

    def fit_head(self, backbone: Backbone, rows: Sequence[TokenRow], labels: Tensor, classes: int) -> Choice:
        head = SideHead(backbone.hidden_size, classes, width=self.width, epochs=self.epochs, seed=self.head_seed)

        def read(indices: Sequence[int]) -> list[Tensor]:
            return backbone.frozen_states([rows[index] for index in indices])

        head.fit_tokens(read, [len(row) for row in rows], labels, self.on_progress)
        return Choice(head, Candidate("token states", "side"), [])
