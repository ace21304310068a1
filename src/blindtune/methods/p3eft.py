"""P3EFT hardened: gradients in shares (Algorithm 1), and adapters under pads that only the mixture takes away.

    h'  = h(x, 0) + s h(x, p + δ/2s) − s h(x, p − δ/2s)      eq. 3 with weights (1, s, −s)
    L   = task(head(h'), y)
    ∂L/∂δ by private backpropagation at θ = 0                Algorithm 1, one share for each operator

The published algorithm gives every operator all adapters in the clear, and trains them to tell nothing
(`blindtune.methods.p3eft_published`). Here everything that one operator sees is μ-differentially private in all labels
(`blindtune.privacy.accountant`). What is given up: the model is linear in δ (it is fine-tuned in the tangent space of
the pretrained model), and operators must not collude, which gradient shares ask for anyway.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import ClassVar

from blindtune.client import Backbone, OperatorPool, RemoteBatch
from blindtune.errors import ConfigError
from blindtune.methods.gradients import SharedGradients
from blindtune.methods.integrity import MEMBERS, IntegrityCheck
from blindtune.methods.lora import LoRA
from blindtune.methods.options import check_counts, check_positive
from blindtune.methods.pads import PaddedAdapters, PadPlan
from blindtune.privacy.accountant import allowance
from blindtune.privacy.ledger import Ledger
from blindtune.privacy.randomness import SecureGenerator

SPARE = 1.1
"""A run is planned 10% longer than asked for: steps that are repeated after a crash are sent anew, and count."""

MOST_ROUNDING, MOST_CURVATURE = 0.4, 0.5
"""Errors above these are said."""


class PrecisionWarning(UserWarning):
    """Noise and amplification cost more precision than the default settings do."""


@dataclass
class P3EFT(LoRA):
    """Label-private fine-tuning with one padded adapter.

    Args:
        max_mu: the budget: everything that one operator sees of the run is μ-differentially private in the labels.
        steps, batch_size: length of the run, and texts in a step. Noise is made for so many; a longer run is refused.
        predictions: how many processes may predict with the trained model, each for as long as it runs.
        pad_spread: standard deviation of what a pad adds to a layer's output, in units of the layer's input. Large pads
            disturb the model, small ones ask more of the operators' floating point.
        max_norm: bound on the trained update |scaling · B|, as a root mean square over all updates that were sent so
            far. A longer update is scaled down.
        clip_norm: C, the same for one example's gradient at the hidden states.
        gradient_part: part of the budget that goes to gradients; adapters get the rest.
        check_every: operators' answers to label-free questions are compared in one of so many steps; 0 for never.
        m: gradient shares, see `LoRA`.
        allow_single_operator: lets pads and shares meet at one operator. Then there is no privacy.

    There is no `noise_ratio`, which follows from the budget, and no `adapter_noise`: pads hide an adapter by a known
    amount, and the mixture takes them away again.
    """

    m: int = 2
    steps: int = 1000
    batch_size: int = 32
    predictions: int = 50
    max_mu: float = 0.25  # pyright: ignore[reportIncompatibleVariableOverride] - a number, never None
    pad_spread: float = 0.05
    max_norm: float = 12.0
    clip_norm: float = 2.0
    gradient_part: float = 0.5
    check_every: int = 50
    noise_ratio: float = field(init=False, default=0.0)
    adapter_noise: float = field(init=False, default=0.0)

    name: ClassVar[str] = "p3eft"
    default_rank: ClassVar[int] = 32
    default_lr: ClassVar[float] = 2e-3
    channel: PaddedAdapters = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, batch_size=self.batch_size, predictions=self.predictions + 1)
        check_positive(max_mu=self.max_mu, pad_spread=self.pad_spread, max_norm=self.max_norm)
        if self.check_every != 0:
            check_counts(check_every=self.check_every)
        if self.m == 1:
            raise ConfigError("m = 1: a gradient in the clear tells labels.", remedy="Use m=2 or more.")
        if not 0 < self.gradient_part < 1:
            raise ConfigError(
                f"gradient_part = {self.gradient_part} leaves nothing to adapters or to gradients.",
                remedy="Use a number between 0 and 1, such as 0.5.",
            )
        rows = math.ceil(SPARE * self.steps) * self.batch_size
        self.noise_ratio = math.sqrt(rows / (self.gradient_part * allowance(self.max_mu)))
        super().__post_init__()

    @property
    def fixed_a(self) -> bool:
        return True

    @property
    def plan(self) -> PadPlan:
        adapters = math.ceil(SPARE * (self.steps + 2)) + self.predictions  # of each step, and of the end
        brought = (1.0 - self.gradient_part) * allowance(self.max_mu) / adapters
        return PadPlan(self.pad_spread, self.max_norm, brought, allowance(self.max_mu), self.steps)

    @property
    def ledger(self) -> Ledger:
        return self.channel.ledger

    def make_shares(self, generator: SecureGenerator) -> SharedGradients:
        single = self.allow_single_operator
        budget = None if single else self.max_mu
        return SharedGradients(self.m, self.clip_norm, self.noise_ratio, generator, single, budget, silent=True)

    @property
    def label_mu(self) -> float:
        return math.inf if self.allow_single_operator else self.max_mu

    @property
    def watches_batches(self) -> bool:
        return True

    def attach(self, backbone: Backbone, classes: int, generator: SecureGenerator) -> None:
        self.shares = self.make_shares(generator)
        integrity = IntegrityCheck(generator, self.shares.ledger, self.check_every)
        self.channel = PaddedAdapters(self.shares, generator, self.plan, integrity)
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

    def probe(self, batch: RemoteBatch, pool: OperatorPool) -> dict[str, float]:
        if len(batch.operators) < MEMBERS:
            return {}
        found = self.channel.probe(batch, pool)
        for name, error, most, remedy in (
            ("rounding at the operators", found.rounding, MOST_ROUNDING, "a larger max_mu, or operators in float64"),
            ("the size of the pads", found.curvature, MOST_CURVATURE, "a smaller pad_spread"),
        ):
            if error > most:
                warnings.warn(
                    f"{name[0].upper()}{name[1:]} makes an error of {error:.0%} in what the head reads, and may cost "
                    f"accuracy. Use {remedy}.",
                    PrecisionWarning,
                    stacklevel=4,
                )
                break  # rounding that is so large hides what pads do
        return {"rounding_error": found.rounding, "pad_error": found.curvature}

    def report(self) -> dict[str, float]:
        if self.allow_single_operator:
            return {}
        found = {**self.ledger.guarantee().report(), "mu_budget": self.max_mu, "budget_used": self.ledger.used()}
        told = {"nonfinite_messages": self.channel.shares.nonfinite + self.channel.nonfinite}
        told["unseen_writes"] = self.channel.unseen
        return {**found, **{name: count for name, count in told.items() if count}}
