"""Head only: the frozen model's features, each text sent once, no adapters. Nothing about labels leaves the client."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from blindtune.methods.lora import LoRA


@dataclass
class HeadOnly(LoRA):
    """The floor for accuracy, and perfect label privacy: servers see texts and nothing else."""

    adapter_noise: float = field(init=False, default=0.0)  # there are no adapters

    name: ClassVar[str] = "head_only"

    @property
    def num_adapters(self) -> int:
        return 0

    @property
    def label_mu(self) -> float:
        return 0.0
