"""Padded LoRA, our own method: gradients in shares, and one adapter under one-time pads that only the client removes.

    h'  = h(x, 0) + s h(x, p + δ/2s) − s h(x, p − δ/2s)      eq. 3 with weights (1, s, −s)
    L   = task(head(h'), y)
    ∂L/∂δ by private backpropagation at θ = 0                Algorithm 1, one share for each operator

It uses private backpropagation (P3EFT, Algorithm 1) and the form of P3EFT's mixture (eq. 3). P3EFT itself (Algorithm 2,
`blindtune.labels.methods.p3eft`) sends operators the adapters in the clear, and trains them to reveal nothing. Here
everything that one operator sees is μ-differentially private in all labels (`blindtune.privacy.accountant`). There are
two limitations: the model is linear in δ (it is fine-tuned in the tangent space of the pretrained model), and operators
must not collude, which gradient shares require anyway.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import ClassVar

from blindtune.checks import check_counts, check_positive, check_switches
from blindtune.client import Backbone, OperatorPool, RemoteBatch
from blindtune.errors import ConfigError
from blindtune.labels.channels.integrity import MEMBERS, IntegrityCheck
from blindtune.labels.channels.padded import PaddedAdapters, PadPlan
from blindtune.labels.channels.private_backprop import PrivateBackprop, PrivateBackpropOptions
from blindtune.labels.methods.base import Method, method
from blindtune.labels.placement import Part, listed
from blindtune.privacy.accountant import allowance, gaussian_guarantee, mu_of
from blindtune.privacy.ledger import Ledger
from blindtune.privacy.randomness import SecureGenerator

SPARE = 1.1
"""Factor on the planned number of steps. Steps that are repeated after a crash are sent again, and count."""

MOST_ROUNDING, MOST_CURVATURE = 0.4, 0.5
"""Relative errors above which a `PrecisionWarning` is given."""


class PrecisionWarning(UserWarning):
    """The errors due to pads and amplification are larger than with the default settings."""


@method
@dataclass
class PaddedLoRA(Method):
    """Trains one padded adapter: what each operator sees of the labels is bounded by differential privacy.

    Args:
        m: number of gradient shares, at least 2. It needs m operators that don't collude.
        steps, batch_size: number of steps in the run, and of texts in a step. The noise is calibrated for them; a
            longer run is refused.
        predictions: number of processes that may predict with the trained model, each for as long as it runs.
        max_mu: the budget: everything that one operator sees of the run is μ-differentially private in the labels.
        pad_spread: standard deviation of what a pad adds to a layer's output, in units of the layer's input. Large pads
            change how the model computes; small ones need more precision of the operators' floating point.
        max_norm: bound on the trained update |scaling · B|, as a root mean square over all updates that were sent so
            far. An update that would exceed it is scaled down.
        clip_norm: C, a bound of the same kind on one example's gradient at the hidden states.
        gradient_part: fraction of the budget for gradients. The rest is for adapters.
        check_every: average number of steps between comparisons of operators' responses to label-free requests; 0 for
            none.
        allow_single_operator: allows sending both padded adapters and all shares to one operator. Then there is no
            privacy.
    Raises:
        ConfigError: an option is out of range.
    """

    m: int = 2
    steps: int = 1000
    batch_size: int = 32
    predictions: int = 50
    max_mu: float = 0.25
    pad_spread: float = 0.05
    max_norm: float = 12.0
    clip_norm: float = 2.0
    gradient_part: float = 0.5
    check_every: int = 50
    allow_single_operator: bool = False

    name: ClassVar[str] = "padded-lora"
    title: ClassVar[str] = "padded LoRA"
    default_rank: ClassVar[int] = 32
    default_lr: ClassVar[float] = 2e-3
    fixed_a: ClassVar[bool] = True
    watches_batches: ClassVar[bool] = True
    channel: PaddedAdapters = field(init=False, repr=False, compare=False)
    """The channel that `attach` made."""

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, batch_size=self.batch_size, predictions=self.predictions + 1)
        check_positive(max_mu=self.max_mu, pad_spread=self.pad_spread, max_norm=self.max_norm, clip_norm=self.clip_norm)
        check_counts(m=self.m)
        check_switches(allow_single_operator=self.allow_single_operator)
        if self.check_every != 0:
            check_counts(check_every=self.check_every)
        if self.m == 1:
            raise ConfigError("m = 1: a gradient in the clear reveals labels.", remedy="Use m=2 or more.")
        if not 0 < self.gradient_part < 1:
            raise ConfigError(
                f"gradient_part = {self.gradient_part} leaves nothing to adapters or to gradients.",
                remedy="Use a number between 0 and 1, such as 0.5.",
            )

    @property
    def backprop(self) -> PrivateBackpropOptions:
        """Options for sending gradients, with the noise that their part of the budget requires."""
        rows = math.ceil(SPARE * self.steps) * self.batch_size
        noise_ratio = math.sqrt(rows / (self.gradient_part * allowance(self.max_mu)))
        single = self.allow_single_operator
        budget = None if single else self.max_mu
        return PrivateBackpropOptions(self.m, self.clip_norm, noise_ratio, budget, single)

    @property
    def plan(self) -> PadPlan:
        """Public parameters of the pads."""
        adapters = math.ceil(SPARE * (self.steps + 2)) + self.predictions  # two more at the end of the run
        brought = (1.0 - self.gradient_part) * allowance(self.max_mu) / adapters
        return PadPlan(self.pad_spread, self.max_norm, brought, allowance(self.max_mu), self.steps)

    @property
    def ledger(self) -> Ledger:
        return self.channel.ledger

    @property
    def label_mu(self) -> float:
        return math.inf if self.allow_single_operator else self.max_mu

    def attach(self, backbone: Backbone, classes: int, generator: SecureGenerator) -> None:
        shares = PrivateBackprop(self.backprop, generator, silent=True)
        integrity = IntegrityCheck(generator, shares.ledger, self.check_every)
        self.channel = PaddedAdapters(shares, generator, self.plan, integrity)
        backbone.channel = self.channel

    def check(self, backbone: Backbone) -> None:
        self.channel.shares.check_operators(len(backbone.pool), backbone.info.dtype)
        if backbone.pooling == "none":
            raise ConfigError("Padded LoRA needs one vector for each text.", remedy="Use another pooling than none.")
        if backbone.adapter_config.lora_alpha <= 0:
            raise ConfigError(
                f"lora_alpha = {backbone.adapter_config.lora_alpha}: no pad is large enough for such adapters.",
                remedy="Use a positive number, such as twice the rank.",
            )

    def probe(self, batch: RemoteBatch, pool: OperatorPool) -> dict[str, float]:
        if len(batch.operators) < MEMBERS:
            return {}
        precision = self.channel.probe(batch, pool)
        remedies = ("a larger max_mu, or operators in float64", "a smaller pad_spread")
        for name, error, most, remedy in (
            ("rounding at the operators", precision.rounding, MOST_ROUNDING, remedies[0]),
            ("the size of the pads", precision.curvature, MOST_CURVATURE, remedies[1]),
        ):
            if error > most:
                warnings.warn(
                    f"{name[0].upper()}{name[1:]} makes an error of {error:.0%} in the head's input, which may lower "
                    f"the accuracy. Use {remedy}.",
                    PrecisionWarning,
                    stacklevel=4,
                )
                break  # with such a rounding error, the other one can't be measured
        return {"rounding_error": precision.rounding, "pad_error": precision.curvature}

    def report(self) -> dict[str, float]:
        if self.allow_single_operator:
            return {}
        numbers = {**self.ledger.guarantee().report(), "mu_budget": self.max_mu, "budget_used": self.ledger.used()}
        problems = {"nonfinite_messages": self.channel.shares.nonfinite + self.channel.nonfinite}
        problems["unseen_writes"] = self.channel.unseen
        return {**numbers, **{name: count for name, count in problems.items() if count}}

    def exposure(self, part: Part, operators: int, *, random_adam_moments: float = 0.0) -> str:
        compromised = operators < self.m
        adapters = "both padded adapters" if compromised else "one adapter under a pad"
        seen = ["texts"]
        if part.adapters and part.share:
            seen.append(adapters)
        if part.share:
            seen.append("every share" if compromised else "one share of each gradient")
        later = part.predictions and not (part.adapters and part.share)
        after = f", {adapters} where you validate or predict" if later else ""
        return f"sees {listed(seen)}, {part}{after}: {self._learns(part, compromised)}"

    def _learns(self, part: Part, compromised: bool) -> str:
        if not (part.share or part.predictions):
            return "nothing about labels"
        if part.share and compromised:
            return "it can learn the labels from gradients: their shares meet here"
        guarantee = gaussian_guarantee(mu_of(self.ledger.limit))
        return (
            f"all that it sees of the run is μ-differentially private in all labels with μ = {guarantee.mu:g}, so ε = "
            f"{guarantee.epsilon:.2g} at δ = {guarantee.delta:g}: no test of one label has an AUC above "
            f"{guarantee.auc_bound:.3f}"
        )
