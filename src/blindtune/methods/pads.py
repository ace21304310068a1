"""Padded adapters over operators: each sees the secret update under a pad; gradients are taken at a public point."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from blindtune.client import OperatorPool, RemoteBatch
from blindtune.errors import BudgetSpent, ConfigError, SingleOperator
from blindtune.methods.gradients import SharedGradients, fingerprint
from blindtune.methods.integrity import MEMBERS, IntegrityCheck
from blindtune.privacy.accountant import mu_of
from blindtune.privacy.ledger import Ledger, Message, new_id
from blindtune.privacy.pads import PadScale, pad_pair, unpad
from blindtune.privacy.randomness import SecureGenerator

SMALLEST_RESOLUTION = 0.5
LOG = logging.getLogger(__name__)
"""For what must not be an error, not even where warnings are: it would tell something."""


@dataclass(frozen=True)
class PadPlan:
    """Public numbers of the pads of a run.

    Attributes:
        spread: standard deviation of what a pad adds to a layer's output, in units of the layer's input.
        max_norm: bound on the root mean square of |scaling · δ| over all updates that were sent so far.
        allowance: |δ/2s|² / σ² that each new padded adapter brings.
        limit: most that one padded adapter may ever cost.
        steps: of training; adapters more are sent at the end, and for predictions.
    """

    spread: float
    max_norm: float
    allowance: float
    limit: float
    steps: int


@dataclass(frozen=True)
class Precision:
    """How far h' is from h(x, 0) + J δ, measured on texts with a random δ of norm `max_norm`.

    Attributes:
        rounding: root mean square error of a value of h' that floating point makes and s amplifies, in units of the
            spread of h(x, 0) over the texts.
        curvature: the same error that pads make, relative to J δ.
    """

    rounding: float
    curvature: float


@dataclass(frozen=True)
class _Pad:
    """How one update travels."""

    plus: Tensor
    minus: Tensor
    factor: float


@dataclass
class PaddedAdapters:
    """A channel for one secret adapter δ (its B matrices; A is public) over pairs of operators.

        first operator:   h(x, p + δ/2s),  h(x, 0);  one share of the gradient, at θ = 0
        second operator:  h(x, p − δ/2s);            the other share, at θ = 0
        client:           h' = h(x, 0) + s (h₊ − h₋)

    Gradients are asked for at θ = 0, where the model is the pretrained one, so what an operator differentiates has
    nothing to do with labels either. Every call of `gradients`, every step of an optimizer, and every write to the
    adapters that torch sees begins a new period. What is written in a way that it doesn't see is sent in the next one.
    In each, δ travels under a new pad and counts, also if it is what it was before: whether it changed depends on
    labels. Within a period δ travels as the same bytes, so evaluations and the step after them are one message.
    Nothing is known of other processes: each that predicts with a loaded model sends a message of its own.

    Attributes:
        shares: how gradients travel; its ledger counts adapters too.
        integrity: compares operators' answers to label-free questions.
    """

    shares: SharedGradients
    generator: SecureGenerator
    plan: PadPlan
    integrity: IntegrityCheck
    nonfinite: int = field(init=False, default=0)
    """Adapters with NaN or infinity; zero was sent in their place."""
    unseen: int = field(init=False, default=0)
    """Passes over an adapter that was written to behind torch's back; operators had what it was before."""
    version: tuple[int, ...] | None = field(init=False, repr=False, default=None)
    """The adapter's, in this period; None before anything was sent."""
    _sent: dict[tuple[str, ...], tuple[bytes, _Pad]] = field(
        init=False, repr=False, default_factory=dict[tuple[str, ...], tuple[bytes, "_Pad"]]
    )
    """What was sent in this period, by shape and operators: the update's fingerprint, and how it travels."""
    _factors: WeakKeyDictionary[RemoteBatch, float] = field(
        init=False, repr=False, default_factory=WeakKeyDictionary[RemoteBatch, float]
    )

    @property
    def ledger(self) -> Ledger:
        return self.shares.ledger

    def scale(self, batch: RemoteBatch) -> PadScale:
        """The run's public numbers for adapters of this shape."""
        spec = batch.spec
        sigma = self.plan.spread / (spec.scaling * spec.rank**0.5)
        norm = self.plan.max_norm / spec.scaling
        return PadScale.for_allowance(sigma, norm, self.plan.allowance, limit=self.plan.limit)

    def choose(self, operators: int, step: int) -> tuple[int, ...]:
        return self.shares.choose(operators, step)

    def holders(self, operators: int, step: int) -> tuple[int, ...]:
        """Those of `choose` that get the adapter under a pad; others get a share of the gradient alone."""
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
        """Measures what amplification and pads cost in precision. Nothing of it depends on labels.

        Three pairs of padded adapters are sent: (p, δ) and (p, 2δ), whose answers differ from one multiple of J_p δ by
        rounding alone, and (p', δ).
        """
        scale = self.scale(batch)
        key = self.generator.derive(b"probe", *(fingerprint(tensor) for tensor in batch.tokens.tensors().values()))
        direction = key.normal(batch.weights.shape[1])
        delta = direction * (self.plan.max_norm / batch.spec.scaling / direction.norm())
        self.ledger.enlist(pool.names)
        self.ledger.record(Message("check", dict.fromkeys(self._members(batch, pool), 0.0)))
        base = at_zero(batch).forward(pool, batch.operators[0])
        moved: list[Tensor] = []
        for factor, pad in ((1.0, b"p"), (2.0, b"p"), (1.0, b"q")):
            points = scale.lattice.round(factor * delta / (2.0 * scale.amplification), key)
            plus, minus = pad_pair(points, scale.lattice, generator=key.derive(pad))
            moved.append(self._mixture(batch, pool, plus, minus, retain=False) - (0 if base is None else base))
        once, twice, other = moved
        rounding = (twice - 2 * once).square().mean().sqrt() / 5**0.5
        apart = (once - other).square().mean() / 2
        moves = (once.square().mean() - rounding.square()).clamp_min(1e-30)
        curvature = ((apart - rounding.square()).clamp_min(0.0) / moves).sqrt()
        spread = torch.ones(()) if base is None else base.std(dim=1).square().mean().sqrt()
        return Precision(float(rounding / spread.clamp_min(1e-30)), float(curvature))

    def _mixture(self, batch: RemoteBatch, pool: OperatorPool, plus: Tensor, minus: Tensor, *, retain: bool) -> Tensor:
        """h' = h(x, 0) + s (h₊ − h₋); `retain` keeps the graphs at θ = 0."""
        base = at_zero(batch)

        def call(position: int, padded: Tensor | None) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
            def work() -> tuple[Tensor | None, Tensor | None]:
                operator = batch.operators[position]
                moved = None if padded is None else batch.with_weights(padded.unsqueeze(0)).forward(pool, operator)
                frozen = (
                    base.forward(pool, operator, retain=retain, want=position == 0) if retain or position == 0 else None
                )
                return moved, frozen

            return work

        if len(batch.operators) < MEMBERS:  # the caller accepted that both meet here
            parts = [call(0, plus)(), (batch.with_weights(minus.unsqueeze(0)).forward(pool, batch.operators[0]), None)]
        else:
            padded = [plus, minus, *([None] * (len(batch.operators) - MEMBERS))]
            parts = pool.parallel([call(position, weights) for position, weights in enumerate(padded)])
        (first, frozen), (second, _) = parts[:2]
        assert first is not None and second is not None and frozen is not None  # noqa: S101, PT018 - asked for
        return unpad(frozen, first, second, self.scale(batch).amplification)

    def _check_members(self, operators: int) -> None:
        """Raises `SingleOperator` if both halves of a pad would meet."""
        if operators < MEMBERS and not self.shares.allow_single_operator:
            raise SingleOperator(
                f"A padded adapter needs {MEMBERS} operators that don't collude; {operators} is given.",
                remedy="Add an operator (--server); this holds for predictions too.",
            )

    def _pad(self, batch: RemoteBatch, pool: OperatorPool) -> _Pad:
        """The two halves of the pad for the batch's δ, written to the ledger before they are sent."""
        scale, delta = self.scale(batch), batch.weights[0]
        content = fingerprint(delta)
        members = self._members(batch, pool)
        if self.version not in (None, batch.version):
            self._begin_period()
        self.version = batch.version
        context = (repr((batch.spec.model_dump(), scale)), *members)
        if context in self._sent:
            sent, pad = self._sent[context]
            if sent != content:  # a new message would tell that it changed
                self.unseen += 1
                LOG.warning(
                    "The adapter was changed in a way that torch doesn't see, such as through .data. What operators "
                    "compute with is what it was before. Use copy_ under torch.no_grad()."
                )
            return pad
        if not bool(torch.isfinite(delta).all()):  # an error would tell at which step; nobody sees what is sent
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
        """Raises `ConfigError` for an adapter of so many values that rounding them takes most of what they may cost."""
        left = scale.resolution(size, self.plan.allowance)
        if left < SMALLEST_RESOLUTION:
            raise ConfigError(
                f"An adapter of {size} trained values is too large for {self.plan.steps} steps at "
                f"μ = {mu_of(self.ledger.limit):.3g}: float32 has too few bits for its pad.",
                remedy="Use a lower rank, fewer layers, fewer steps, or a larger max_mu.",
            )

    def _check_room(self, batch: RemoteBatch, pool: OperatorPool, rows: int) -> None:
        """Raises `BudgetSpent` if the adapter that a step leads to could never be sent, not even to predict."""
        if not self.ledger.compromised:
            self._check_budget(self._members(batch, pool), self.shares.brought(rows))

    def _check_budget(self, members: list[str], before: float = 0.0) -> None:
        """Raises `BudgetSpent` if no adapter may be sent any more once messages have brought `before`."""
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
        """Names of the two operators that see the adapter."""
        return [pool.names[index] for index in batch.operators[:MEMBERS]]


def at_zero(batch: RemoteBatch) -> RemoteBatch:
    """The same texts under the public adapter that changes nothing."""
    return batch.with_weights(torch.zeros_like(batch.weights[:1]))
