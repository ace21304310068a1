"""Padded adapters over operators: each sees the secret update under a pad; gradients are taken at a public point."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from blindtune.client import OperatorPool, RemoteBatch
from blindtune.errors import BudgetSpent, NonFiniteTensor, SingleOperator
from blindtune.methods.gradients import SharedGradients, fingerprint, message_id
from blindtune.methods.integrity import MEMBERS, IntegrityCheck
from blindtune.privacy.accountant import mu_of
from blindtune.privacy.ledger import Entry, Ledger
from blindtune.privacy.pads import PadScale, bounded, pad_pair, unpad
from blindtune.privacy.randomness import SecureGenerator

KNOWN_UPDATES = 64


@dataclass(frozen=True)
class PadPlan:
    """Public numbers of the pads of a run.

    Attributes:
        spread: standard deviation of what a pad adds to a layer's output, in units of the layer's input.
        max_norm: bound on the root mean square of |scaling · δ| over all updates that were sent so far.
        allowance: |δ/2s|² / σ² that each new padded adapter brings.
        steps: of training; an adapter more is sent at the end.
    """

    spread: float
    max_norm: float
    allowance: float
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
    nothing to do with labels either. The pad is bound to δ, the adapters' shape and the two operators in their order:
    the same δ always travels as the same bytes, so a repeated step, an evaluation and the step after it are one view.
    An *earlier* δ that comes back, such as that of the best checkpoint, gets a new pad and counts again: equal bytes
    would tell which step was chosen.

    Attributes:
        shares: how gradients travel; its ledger counts adapters too.
        integrity: compares operators' answers to label-free questions.
    """

    shares: SharedGradients
    generator: SecureGenerator
    plan: PadPlan
    integrity: IntegrityCheck
    _earliest: int = field(init=False, default=0)
    """Place in the ledger of the last update that was sent: none before it travels as the same bytes again."""
    _factors: OrderedDict[bytes, float] = field(init=False, repr=False, default_factory=OrderedDict[bytes, float])
    _lock: Lock = field(init=False, repr=False, default_factory=Lock)
    """Of the ledger: inference asks for hidden states from several threads."""

    @property
    def ledger(self) -> Ledger:
        return self.shares.ledger

    def scale(self, batch: RemoteBatch) -> PadScale:
        """The run's public numbers for adapters of this shape."""
        spec = batch.spec
        sigma = self.plan.spread / (spec.scaling * spec.rank**0.5)
        limit = 1.0 if math.isinf(self.ledger.limit) else self.ledger.limit
        return PadScale.for_allowance(sigma, self.plan.max_norm / spec.scaling, self.plan.allowance, limit=limit)

    def replay(self) -> None:
        """A run is resumed from an earlier step: its adapters may be sent again as the same bytes, in their order."""
        self._earliest = 0

    def no_replay(self) -> None:
        """Only the last adapter may be sent again as the same bytes."""
        self._earliest = max(0, self.ledger.last)

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
        if not bool(torch.isfinite(batch.weights).all()):
            raise NonFiniteTensor(
                "The adapter holds NaN or infinity; nothing was sent.", remedy="Resume the last step."
            )
        if retain and len(batch.operators) >= MEMBERS:
            self.integrity.before_step(batch, pool, self.scale(batch).lattice, self.shares.lattice)
        with self._lock:
            pad = self._pad(batch, pool)
        return self._mixture(batch, pool, pad.plus, pad.minus, retain=retain)

    def gradients(self, cotangent: Tensor, batch: RemoteBatch, pool: OperatorPool) -> Tensor:
        self._check_room(batch, pool)
        factor = self._factors[fingerprint(batch.weights[0])]
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
        self.ledger.enlist(pool.urls)
        self.ledger.record(
            [Entry(url, "check", f"probe {message_id(key)}", 0.0, 0.0) for url in self._members(batch, pool)]
        )
        base = at_zero(batch).forward(pool, batch.operators[0])
        moved: list[Tensor] = []
        for factor, pad in ((1.0, b"p"), (2.0, b"p"), (1.0, b"q")):
            points = scale.points(factor * delta, generator=key)
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
        if len(batch.operators) < MEMBERS:
            self.ledger.compromise()
        self.ledger.enlist(pool.urls)
        members = self._members(batch, pool)
        made_from = [fingerprint(delta), repr((batch.spec.model_dump(), scale)).encode()]
        update, times = self._place(made_from)
        generator = self.generator.derive(b"pad", *made_from, times, *(member.encode() for member in members))
        message = message_id(generator)
        known = self.ledger.find(members, message)
        factor = known.factor if known else bounded(delta, self._longest(members, scale, delta.numel()))[1]
        points = scale.points(delta.double() * factor, generator=generator)
        if not self.ledger.compromised:
            brought, cost = self.plan.allowance, scale.cost(points)
            self.ledger.record([Entry(member, "adapter", message, brought, cost, factor, update) for member in members])
            self._earliest = max(self._earliest, self.ledger.position(update) or 0)
        self._factors[fingerprint(delta)] = factor
        while len(self._factors) > KNOWN_UPDATES:
            self._factors.popitem(last=False)
        return _Pad(*pad_pair(points, scale.lattice, generator=generator.bound_to(points)), factor)

    def _place(self, made_from: list[bytes]) -> tuple[str, bytes]:
        """What identifies an update in the ledger, and how often it has come back after others."""
        returned = 0
        while True:
            times = returned.to_bytes(8, "little")
            update = message_id(self.generator.derive(b"update", *made_from, times))
            place = self.ledger.position(update)
            if place is None or place >= self._earliest:
                return update, times
            returned += 1

    def _longest(self, members: list[str], scale: PadScale, size: int) -> float:
        """The longest δ that may be sent now. Raises `BudgetSpent` if none may be."""
        if self.ledger.compromised:
            return math.inf
        self._check_budget(members)
        return scale.longest(self.ledger.room(members, self.plan.allowance), size)

    def _check_room(self, batch: RemoteBatch, pool: OperatorPool) -> None:
        """Raises `BudgetSpent` if the adapter that a step leads to could never be sent, not even to predict."""
        if not self.ledger.compromised:
            self._check_budget(self._members(batch, pool))

    def _check_budget(self, members: list[str]) -> None:
        try:
            self.ledger.check(members, self.plan.allowance)
        except BudgetSpent:
            raise BudgetSpent(
                f"The run was planned for {self.plan.steps} steps, and its budget of "
                f"μ = {mu_of(self.ledger.limit):.3g} is spent.",
                remedy="What was learned can be used over the operators that trained it, in their order. For a longer "
                "run, plan more steps (steps=…) before it begins.",
            ) from None

    @staticmethod
    def _members(batch: RemoteBatch, pool: OperatorPool) -> list[str]:
        """Addresses of the two operators that see the adapter."""
        return [pool.urls[index] for index in batch.operators[:MEMBERS]]


def at_zero(batch: RemoteBatch) -> RemoteBatch:
    """The same texts under the public adapter that changes nothing."""
    return batch.with_weights(torch.zeros_like(batch.weights[:1]))
