"""Plain LoRA over the API: one adapter. The reference for accuracy. Every other method begins from here.

Gradients travel in the clear, or in m shares to m operators (P3EFT, Algorithm 1) if asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from blindtune.client import Backbone, OperatorPool, PlainChannel, RemoteBatch
from blindtune.errors import ConfigError
from blindtune.methods.gradients import SharedGradients
from blindtune.methods.options import check_budget, check_counts, check_positive, check_switches, check_weights
from blindtune.models.tokenizer import TokenRow
from blindtune.privacy.ledger import Ledger
from blindtune.privacy.randomness import SecureGenerator


@dataclass
class LoRA:
    """One adapter in the clear: an operator can learn labels from activations, and without shares from gradients.

    Args:
        m: gradient shares; as many operators that don't collude are needed. 1: true gradients in the clear.
        clip_norm: bound C on one example's gradient at the hidden states of all adapters together, as a root mean
            square over all examples so far, if there are shares.
        noise_ratio: σ / C. μ of the shares is 2 √(examples in all steps) / noise_ratio.
        max_mu: budget for μ of the shares; the run stops before the step that would exceed it.
        allow_single_operator: lets shares meet at one operator. Then there is no gradient privacy.
        adapter_noise: standard deviation of noise on the weights of the adapters that travel (P3EFT, section 3.2);
            operators then don't see what a step changed. The model that is trained is that of the noisy adapters.
    Raises:
        ConfigError: an option that makes no sense; a budget, or noise on adapters, without shares: gradients in the
            clear tell what a step changed.
    """

    m: int = 1
    clip_norm: float = 10.0
    noise_ratio: float = 100.0
    max_mu: float | None = None
    allow_single_operator: bool = False
    adapter_noise: float = 0.0

    name: ClassVar[str] = "lora"
    default_rank: ClassVar[int] = 8
    default_lr: ClassVar[float] = 3e-3
    attached: bool = field(init=False, repr=False, compare=False, default=False)
    shares: SharedGradients | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        check_counts(m=self.m)
        check_positive(clip_norm=self.clip_norm, noise_ratio=self.noise_ratio)
        check_switches(allow_single_operator=self.allow_single_operator)
        check_budget(self.max_mu)
        check_weights(adapter_noise=self.adapter_noise)
        if self.m == 1 and self.adapter_noise > 0:
            raise ConfigError(
                f"adapter_noise = {self.adapter_noise} hides nothing: gradients travel in the clear.",
                remedy="Use m=2 or more.",
            )
        if self.m == 1 and self.max_mu is not None:
            raise ConfigError(
                f"max_mu = {self.max_mu} can't be kept: gradients travel in the clear.", remedy="Use m=2 or more."
            )

    @property
    def num_adapters(self) -> int:
        return 1

    @property
    def fixed_a(self) -> bool:
        return False

    @property
    def needs_frozen(self) -> bool:
        return False

    @property
    def learned(self) -> str:
        """What adapters learn, and operators from them, in words."""
        return "the labels"

    @property
    def defence(self) -> str | None:
        """What keeps that out of activations and shifts, in words; None: nothing does."""
        return None

    def attach(self, backbone: Backbone, classes: int, generator: SecureGenerator) -> None:
        self.shares = self.make_shares(generator) if self.m > 1 else None
        backbone.channel = self.shares or PlainChannel()

    def make_shares(self, generator: SecureGenerator) -> SharedGradients:
        """The channel with these options."""
        return SharedGradients(
            self.m,
            self.clip_norm,
            self.noise_ratio,
            generator,
            self.allow_single_operator,
            self.max_mu,
            self.num_adapters,
            self.adapter_noise,
        )

    @property
    def ledger(self) -> Ledger | None:
        """Counts what operators are sent; None where everything travels in the clear."""
        return None if self.shares is None else self.shares.ledger

    @property
    def label_mu(self) -> float:
        return math.inf

    @property
    def watches_batches(self) -> bool:
        return False

    def check(self, backbone: Backbone) -> None:
        if self.shares is not None:
            self.shares.check_operators(len(backbone.pool), backbone.info.dtype)

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
        return {} if self.shares is None else self.shares.report()

    def state(self) -> dict[str, Tensor]:
        return self.snapshot()

    def snapshot(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing of plain LoRA is secret or learned beside the adapter."""

    def probe(self, batch: RemoteBatch, pool: OperatorPool) -> dict[str, float]:
        return {}
