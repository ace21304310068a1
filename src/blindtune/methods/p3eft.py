"""P3EFT hardened: gradients in shares (Algorithm 1), and adapters under pads that only the mixture takes away.

    h'  = h(x, 0) + s h(x, p + δ/2s) − s h(x, p − δ/2s)      eq. 3 with weights (1, s, −s)
    L   = task(head(h'), y)
    ∂L/∂δ by private backpropagation at θ = 0                Algorithm 1, one share for each operator

The published algorithm gives every operator all adapters in the clear, and trains them to tell nothing
(`blindtune.methods.p3eft_published`). Here no operator receives an adapter that depends on the labels by more than a
known number of bits. What is given up: the model is linear in δ (it is fine-tuned in the tangent space of the
pretrained model), and operators must not collude, which gradient shares ask for anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from blindtune.client import Backbone
from blindtune.errors import ConfigError
from blindtune.methods.lora import LoRA
from blindtune.methods.options import check_counts, check_positive
from blindtune.methods.pads import PaddedAdapters
from blindtune.privacy.randomness import SecureGenerator


@dataclass
class P3EFT(LoRA):
    """Label-private fine-tuning with one padded adapter.

    Args:
        steps: length of the run. The pads are made for so many different adapters; a longer run is refused.
        max_bits: what all padded adapters that one operator sees may tell about all labels together.
        pad_spread: standard deviation of what a pad adds to a layer's output, in units of the layer's input. Large pads
            disturb the model, small ones ask more of the operators' floating point.
        max_norm: bound on the trained update, |scaling · B|; a longer update is scaled down.
        m, clip_norm, noise_ratio, max_mu: gradient shares, see `LoRA`.
        allow_single_operator: lets pads and shares meet at one operator. Then there is no privacy.

    There is no `adapter_noise`: pads hide an adapter by a known amount, and the mixture takes them away again.
    """

    m: int = 2
    steps: int = 1000
    max_bits: float = 1.0
    pad_spread: float = 0.16
    max_norm: float = 16.0
    adapter_noise: float = field(init=False, default=0.0)

    name: ClassVar[str] = "p3eft"
    default_rank: ClassVar[int] = 32
    default_lr: ClassVar[float] = 2e-3
    channel: PaddedAdapters = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(steps=self.steps)
        check_positive(max_bits=self.max_bits, pad_spread=self.pad_spread, max_norm=self.max_norm)

    @property
    def fixed_a(self) -> bool:
        return True

    def attach(self, backbone: Backbone, classes: int, generator: SecureGenerator) -> None:
        nats = self.max_bits * math.log(2.0)
        self.shares = self.make_shares(generator)
        self.channel = PaddedAdapters(self.shares, generator, self.pad_spread, self.max_norm, self.steps + 1, nats)
        backbone.channel = self.channel

    def check(self, backbone: Backbone) -> None:
        super().check(backbone)
        if backbone.pooling == "none":
            raise ConfigError("P3EFT reads one vector for each text.", remedy="Use another pooling than none.")
        if backbone.adapter_config.lora_alpha <= 0:
            raise ConfigError(
                f"lora_alpha = {backbone.adapter_config.lora_alpha}: no pad is large enough for such adapters.",
                remedy="Use a positive number, such as twice the rank.",
            )

    def report(self) -> dict[str, float]:
        if self.allow_single_operator:
            return {}
        nats = self.channel.ledger.nats() + self.channel.shares.accountant.nats()
        return {**super().report(), "information_bits": nats / math.log(2.0)}

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "ledger": self.channel.ledger.state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        if "ledger" in state:
            self.channel.ledger.load_state(state["ledger"])
