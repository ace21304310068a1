"""Plain LoRA over the API: one adapter, true gradients in the clear. The reference for accuracy, without privacy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from blindtune.client import Backbone, PlainChannel
from blindtune.models.tokenizer import TokenRow
from blindtune.privacy.randomness import SecureGenerator


@dataclass
class LoRA:
    """No defence: every operator that sees a step learns the labels of its batch. Other methods begin from here."""

    name: ClassVar[str] = "lora"
    default_rank: ClassVar[int] = 8
    default_lr: ClassVar[float] = 3e-3

    @property
    def num_adapters(self) -> int:
        return 1

    @property
    def fixed_a(self) -> bool:
        return False

    @property
    def needs_frozen(self) -> bool:
        return False

    def attach(self, backbone: Backbone, classes: int, generator: SecureGenerator) -> None:
        backbone.channel = PlainChannel()

    def check(self, backbone: Backbone) -> None:
        """Any operators will do."""

    def prepare(self, frozen: Tensor, labels: Tensor) -> None:
        """Nothing to learn from the frozen features."""

    def mix(self, hidden: Tensor) -> Tensor:
        return hidden[0]

    def penalties(self, hidden: Tensor, frozen: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
        return {}

    def adapter_labels(self, rows: Sequence[TokenRow], labels: Tensor) -> Tensor:
        return labels

    @property
    def auxiliary(self) -> nn.Module | None:
        return None

    def report(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Tensor]:
        return {}

    def snapshot(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""
