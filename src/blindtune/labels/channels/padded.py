"""Padded adapters: operators see the secret update under one-time pads, and compute gradients at a public point."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from blindtune.client import OperatorPool, RemoteBatch
from blindtune.errors import BudgetSpent, ConfigError, SingleOperator
from blindtune.labels.channels.integrity import MEMBERS, IntegrityCheck
from blindtune.labels.channels.private_backprop import PrivateBackprop, fingerprint
from blindtune.privacy.accountant import mu_of
from blindtune.privacy.ledger import Ledger, Message, new_id
from blindtune.privacy.pads import PadScale, pad_pair, unpad
from blindtune.privacy.randomness import SecureGenerator

SMALLEST_RESOLUTION = 0.5
"""Smallest fraction of an adapter's allowance that rounding to the lattice has to leave."""
LOG = logging.getLogger(__name__)
"""Logger for problems that must not stop a run, since the step at which it stops would reveal something about labels.

It is used instead of `warnings`, because Python can turn warnings into errors.
"""


@dataclass(frozen=True)
class PadPlan:
    """Public parameters of a run's pads.

    Attributes:
        spread: standard deviation of what a pad adds to a layer's output, in units of the layer's input.
        max_norm: bound on the root mean square of |scaling · δ| over all updates that were sent so far.
        allowance: |δ/2s|² / σ² that each new padded adapter adds to the allowance.
        limit: largest cost |δ/2s|² / σ² of one padded adapter.
        steps: number of training steps. More adapters are sent at the end of the run, and for predictions.
    """

    spread: float
    max_norm: float
    allowance: float
    limit: float
    steps: int


@dataclass(frozen=True)
class Precision:
    """Difference between h' and h(x, 0) + J δ, measured on texts with a random δ of norm `max_norm`.

    Attributes:
        rounding: root mean square error of the values of h' due to floating-point rounding, which s amplifies, in units
            of the standard deviation of h(x, 0) over the texts.
        curvature: root mean square error due to the pads, relative to J δ.
    """

    rounding: float
    curvature: float


@dataclass(frozen=True)
class _Pad:
    """The two padded adapters that are sent for one update.

    Attributes:
        plus, minus: the padded adapters p + δ/2s and p − δ/2s, `(P,)`.
        factor: factor by which δ was scaled down to keep its bound; 1 if it wasn't.
    """

    plus: Tensor
    minus: Tensor
    factor: float


@dataclass
class PaddedAdapters:
    """A channel that sends one secret adapter δ (its B matrices; A is public) to pairs of operators.

        first operator:   h(x, p + δ/2s),  h(x, 0);  one share of the gradient, at θ = 0
        second operator:  h(x, p − δ/2s);            the other share, at θ = 0
        client:           h' = h(x, 0) + s (h₊ − h₋)

    Gradients are requested at θ = 0, where the model is the pretrained one, so the function that an operator
    differentiates doesn't depend on labels either.

    A new period begins with each call of `gradients`, each step of an optimizer, and each write to the adapters that
    torch registers. A write that torch doesn't register takes effect in the next period. In each period δ is sent under
    a new pad, and counts, even if δ hasn't changed: whether it changed depends on labels. Within a period δ is sent as
    the same bytes, so that evaluations and the step after them count as one message. Processes don't share periods:
    each process that predicts with a loaded model sends a message of its own.

    Attributes:
        shares: channel of the gradients. Its ledger counts adapters too.
        generator: secret random generator.
        plan: public parameters of the pads.
        integrity: compares operators' responses to label-free requests.
    """

    shares: PrivateBackprop
    generator: SecureGenerator
    plan: PadPlan
    integrity: IntegrityCheck
    nonfinite: int = field(init=False, default=0)
    """Number of adapters with NaN or infinity. Zeros were sent instead."""
    unseen: int = field(init=False, default=0)
    """Number of passes over an adapter that changed without torch registering it. Operators used its earlier values."""
    version: tuple[int, ...] | None = field(init=False, repr=False, default=None)
    """Version of the adapter in this period (`Backbone.version`); None before anything was sent."""
    _sent: dict[tuple[str, ...], tuple[bytes, _Pad]] = field(
        init=False, repr=False, default_factory=dict[tuple[str, ...], tuple[bytes, "_Pad"]]
    )
    """Updates that were sent in this period, by shape and operators: the update's fingerprint, and what was sent."""
    _factors: WeakKeyDictionary[RemoteBatch, float] = field(
        init=False, repr=False, default_factory=WeakKeyDictionary[RemoteBatch, float]
    )
    """`_Pad.factor` of each batch whose backward pass may follow: gradients are scaled by it."""

    @property
    def ledger(self) -> Ledger:
        """The ledger of all messages that depend on labels."""
        return self.shares.ledger

    def scale(self, batch: RemoteBatch) -> PadScale:
        """Returns the public scale of the pads for adapters of this shape."""
        spec = batch.spec
        sigma = self.plan.spread / (spec.scaling * spec.rank**0.5)
        norm = self.plan.max_norm / spec.scaling
        return PadScale.for_allowance(sigma, norm, self.plan.allowance, limit=self.plan.limit)

    def choose(self, operators: int, step: int) -> tuple[int, ...]:
        return self.shares.choose(operators, step)

    def holders(self, operators: int, step: int) -> tuple[int, ...]:
        """Returns the operators of `choose` that get a padded adapter. The others get a share of the gradient alone."""
        return self.choose(operators, step)[:MEMBERS]

    def teams(self, operators: int) -> list[tuple[int, ...]]:
        self._check_members(operators)
        if operators < MEMBERS:
            return [(0,)]
        return [(first, first + 1) for first in range(0, operators - 1, MEMBERS)]

    def hidden(self, batch: RemoteBatch, pool: OperatorPool, *, retain: bool) -> Tensor:
        self._check_members(len(batch.operators))
        if retain and len(batch.operators) >= MEMBERS:
            self.integrity.before_step(batch, pool, self.scale(batch).lattice, self.shares.lattice)
        with self.ledger.exclusive():
            self.ledger.enlist(pool.names)
            pad = self._pad(batch, pool)
            self._factors[batch] = pad.factor
        return self._mixture(batch, pool, pad.plus, pad.minus, retain=retain)

    def gradients(self, cotangent: Tensor, batch: RemoteBatch, pool: OperatorPool) -> Tensor:
        self._check_room(batch, pool, cotangent.shape[1])
        factor = self._factors[batch]
        with self.ledger.exclusive():
            self._begin_period()
        return factor * self.shares.gradients(cotangent, at_zero(batch), pool)

    def probe(self, batch: RemoteBatch, pool: OperatorPool) -> Precision:
        """Measures the errors due to amplification and pads. No message of it depends on labels.

        Three pairs of padded adapters are sent: (p, δ) and (p, 2δ), whose results differ from one multiple of J_p δ by
        rounding alone, and (p', δ).
        """
        scale = self.scale(batch)
        key = self.generator.derive(b"probe", *(fingerprint(tensor) for tensor in batch.tokens.tensors().values()))
        direction = key.normal(batch.weights.shape[1])
        delta = direction * (self.plan.max_norm / batch.spec.scaling / direction.norm())
        self.ledger.enlist(pool.names)
        self.ledger.record(Message("check", dict.fromkeys(self._members(batch, pool), 0.0)))
        base = at_zero(batch).forward(pool, batch.operators[0])
        shifts: list[Tensor] = []
        for factor, pad in ((1.0, b"p"), (2.0, b"p"), (1.0, b"q")):
            points = scale.lattice.round(factor * delta / (2.0 * scale.amplification), key)
            plus, minus = pad_pair(points, scale.lattice, generator=key.derive(pad))
            shifts.append(self._mixture(batch, pool, plus, minus, retain=False) - base)
        once, twice, other = shifts
        rounding = (twice - 2 * once).square().mean().sqrt() / 5**0.5
        error = (once - other).square().mean() / 2
        signal = (once.square().mean() - rounding.square()).clamp_min(1e-30)
        curvature = ((error - rounding.square()).clamp_min(0.0) / signal).sqrt()
        spread = base.std(dim=1).square().mean().sqrt()
        return Precision(float(rounding / spread.clamp_min(1e-30)), float(curvature))

    def _mixture(self, batch: RemoteBatch, pool: OperatorPool, plus: Tensor, minus: Tensor, *, retain: bool) -> Tensor:
        """Computes h' = h(x, 0) + s (h₊ − h₋). With `retain`, operators keep the graphs at θ = 0."""
        base = at_zero(batch)

        def call(position: int, padded: Tensor | None) -> Callable[[], list[Tensor]]:
            """Returns a function that fetches one operator's hidden states: under its padded adapter, if it gets one,
            and, from the first operator, at θ = 0."""

            def work() -> list[Tensor]:
                operator = batch.operators[position]
                hidden: list[Tensor] = []
                if padded is not None:
                    hidden.append(batch.with_weights(padded.unsqueeze(0)).forward(pool, operator))
                if position == 0:
                    hidden.append(base.forward(pool, operator, retain=retain))
                elif retain:
                    base.compute(pool, operator)
                return hidden

            return work

        if len(batch.operators) < MEMBERS:  # the user has accepted that one operator sees both padded adapters
            first, frozen = call(0, plus)()
            second = batch.with_weights(minus.unsqueeze(0)).forward(pool, batch.operators[0])
        else:
            padded = [plus, minus, *([None] * (len(batch.operators) - MEMBERS))]
            results = pool.parallel([call(position, weights) for position, weights in enumerate(padded)])
            (first, frozen), (second,) = results[:2]
        return unpad(frozen, first, second, self.scale(batch).amplification)

    def _check_members(self, operators: int) -> None:
        """Raises `SingleOperator` if one operator would get both padded adapters, unless that is allowed."""
        if operators < MEMBERS and not self.shares.options.allow_single_operator:
            raise SingleOperator(
                f"A padded adapter needs {MEMBERS} operators that don't collude; {operators} is given.",
                remedy="Add an operator (--server); this holds for predictions too.",
            )

    def _pad(self, batch: RemoteBatch, pool: OperatorPool) -> _Pad:
        """Returns the two padded adapters for the batch's δ. They are recorded in the ledger before they are sent."""
        scale, delta = self.scale(batch), batch.weights[0]
        content = fingerprint(delta)
        members = self._members(batch, pool)
        if self.version not in (None, batch.version):
            self._begin_period()
        self.version = batch.version
        context = (repr((batch.spec.model_dump(), scale)), *members)
        if context in self._sent:
            sent, pad = self._sent[context]
            if sent != content:  # a new message would reveal that it changed
                self.unseen += 1
                LOG.warning(
                    "The adapter was changed in a way that torch doesn't see, such as through .data. Operators "
                    "still compute with its earlier values. Write to it with copy_ under torch.no_grad()."
                )
            return pad
        if not bool(torch.isfinite(delta).all()):  # an error would reveal the step; zeros look like any other update
            delta = torch.zeros_like(delta)
            self.nonfinite += 1
        if len(batch.operators) < MEMBERS:
            self.ledger.compromise()
        salt = new_id()
        key = self.generator.derive(b"pad", *(part.encode() for part in (salt, repr(scale), *members)))
        if self.ledger.compromised:
            points, factor = scale.points(delta, self.plan.limit, generator=key)
        else:
            self._check_size(scale, delta.numel())
            self._check_budget(members)
            room = self.ledger.room(members, self.plan.allowance)
            points, factor = scale.points(delta, room, generator=key)
            costs = dict.fromkeys(members, scale.lattice.cost(points))
            self.ledger.record(Message("adapter", costs, self.plan.allowance, salt))
        plus, minus = pad_pair(points, scale.lattice, generator=key.bound_to(points))
        pad = _Pad(plus, minus, factor)
        self._sent[context] = (content, pad)
        return pad

    def _begin_period(self) -> None:
        self._sent.clear()
        self.version = None

    def _check_size(self, scale: PadScale, size: int) -> None:
        """Raises `ConfigError` if rounding an adapter of `size` values would use up most of its allowance."""
        if scale.resolution(size, self.plan.allowance) < SMALLEST_RESOLUTION:
            raise ConfigError(
                f"An adapter of {size} trained values is too large for {self.plan.steps} steps at "
                f"μ = {mu_of(self.ledger.limit):.3g}: float32 has too few bits for its pad.",
                remedy="Use a lower rank, fewer layers, fewer steps, or a larger max_mu.",
            )

    def _check_room(self, batch: RemoteBatch, pool: OperatorPool, rows: int) -> None:
        """Raises `BudgetSpent` if the adapter after this step could never be sent, not even for predictions."""
        if not self.ledger.compromised:
            self._check_budget(self._members(batch, pool), self.shares.brought(rows))

    def _check_budget(self, members: list[str], before: float = 0.0) -> None:
        """Raises `BudgetSpent` if no adapter may be sent after messages that add `before` to the allowance."""
        try:
            self.ledger.check(members, before + self.plan.allowance)
        except BudgetSpent:
            raise BudgetSpent(
                f"The run was planned for {self.plan.steps} steps, and its budget of "
                f"μ = {mu_of(self.ledger.limit):.3g} is spent.",
                remedy="Plan more steps (steps=…) or more processes that predict (predictions=…) before a run begins.",
            ) from None

    @staticmethod
    def _members(batch: RemoteBatch, pool: OperatorPool) -> list[str]:
        """Returns the names of the two operators that get a padded adapter."""
        return [pool.names[index] for index in batch.operators[:MEMBERS]]


def at_zero(batch: RemoteBatch) -> RemoteBatch:
    """Returns a batch of the same texts with one adapter of zeros, under which the model is the pretrained one."""
    return batch.with_weights(torch.zeros_like(batch.weights[:1]))
