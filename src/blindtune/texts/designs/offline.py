"""Offline and Offsite-Tuning: train both ends around an emulator in this process. A step sends nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from blindtune.checks import check_switches
from blindtune.errors import ConfigError
from blindtune.models.cut.parts import PartName
from blindtune.texts.designs.base import BothEnds, design
from blindtune.wire import Codec


@design
@dataclass
class Offline(BothEnds):
    """Trains both ends around an emulator. Nothing is sent until the tuned parts are handed over.

    Decorrelation helps only if texts are sent through the real trunk later.

    Args:
        tune_emulator: whether to train LoRA on the emulator's blocks too. It is handed over with the ends, for those of
            the trunk's blocks that the emulator's blocks stand for: LoRA that was trained on a pruned model is used in
            the full model, as in LoRAM (Zhang et al. 2025).
    """

    tune_emulator: bool = False

    name: ClassVar[str] = "offline"
    emulated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_switches(tune_emulator=self.tune_emulator)

    @property
    def parts(self) -> tuple[PartName, ...]:
        return ("bottom", "trunk", "top") if self.tune_emulator else ("bottom", "top")

    def exposure(self, epochs: int) -> str:
        return "sees nothing of the texts; the client has downloaded an emulator of its trunk"


@design
@dataclass
class Offsite(Offline):
    """Offsite-Tuning (Xiao et al. 2023): like `Offline`, without regularizer and quantization.

    Raises:
        ConfigError: an option differs from the published method.
    """

    up: Codec = "fp32"
    down: Codec = "fp32"

    name: ClassVar[str] = "offsite"

    def __post_init__(self) -> None:
        super().__post_init__()
        changed = self.decorrelation_weight or self.noise or self.tune_emulator
        if changed or (self.up, self.down) != ("fp32", "fp32"):
            raise ConfigError(
                "offsite is Offsite-Tuning as published: without regularizer, noise, quantization or a tuned emulator.",
                remedy="Use --design offline, or leave these options out.",
            )
