"""Padded adapters over operators: each sees the secret update under a pad; gradients are taken at a public point."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from blindtune.client import OperatorPool, RemoteBatch
from blindtune.errors import BudgetSpent, NonFiniteTensor, SingleOperator
from blindtune.methods.gradients import SharedGradients, fingerprint
from blindtune.privacy.accountant import InformationLedger
from blindtune.privacy.pads import PadScale, bounded, pad_pair, unpad
from blindtune.privacy.randomness import SecureGenerator

MEMBERS = 2
SPENT = (
    "What was learned can be used over the operators that trained it, in their order. For a longer run, plan more "
    "steps (steps=…) before it begins."
)


@dataclass
class PaddedAdapters:
    """A channel for one secret adapter δ (its B matrices; A is public) over pairs of operators.

        first operator:   h(x, p + δ/2s),  h(x, 0);  one share of the gradient, at θ = 0
        second operator:  h(x, p − δ/2s);            the other share, at θ = 0
        client:           h' = h(x, 0) + s (h₊ − h₋)

    Gradients are asked for at θ = 0, where the model is the pretrained one, so what an operator differentiates has
    nothing to do with labels either. The pad is bound to δ, the adapters' shape and the two operators in their order:
    the same δ always travels as the same bytes, so a repeated step, an evaluation and the step after it are one view.

    Attributes:
        shares: how gradients travel.
        pad_spread: standard deviation of what a pad adds to a layer's output, in units of the layer's input.
        max_norm: bound on |scaling · δ|.
        views: distinct δ that one operator may see within the budget.
        max_nats: the budget: what all padded adapters that one operator sees may tell about all labels together.
    """

    shares: SharedGradients
    generator: SecureGenerator
    pad_spread: float
    max_norm: float
    views: int
    max_nats: float
    ledger: InformationLedger = field(init=False, default_factory=InformationLedger)
    _lock: Lock = field(init=False, repr=False, default_factory=Lock)
    """Of the ledger: inference asks for hidden states from several threads."""

    def scale(self, batch: RemoteBatch) -> PadScale:
        """The run's public numbers for adapters of this shape."""
        spec = batch.spec
        sigma = self.pad_spread / (spec.scaling * spec.rank**0.5)
        return PadScale.for_budget(sigma, self.max_norm / spec.scaling, self.views, self.max_nats)

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
        scale = self.scale(batch)
        delta = batch.weights[0]
        if not bool(torch.isfinite(delta).all()):
            raise NonFiniteTensor(
                "The adapter holds NaN or infinity; nothing was sent.", remedy="Resume the last step."
            )
        delta, _ = bounded(delta, scale.max_norm)
        members = [operator.encode() for operator in self._members(batch, pool)]
        context = [fingerprint(delta), repr((batch.spec.model_dump(), scale)).encode(), *members]
        generator = self.generator.derive(b"pad", *context)
        plus, minus = pad_pair(delta, scale, generator=generator)
        base = _at_zero(batch)
        self._record(batch, pool, hashlib.sha256(generator.key).hexdigest()[:32], scale)

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
        return unpad(frozen, first, second, scale)

    def gradients(self, cotangent: Tensor, batch: RemoteBatch, pool: OperatorPool) -> Tensor:
        scale = self.scale(batch)
        self._check_room(batch, pool, scale)
        _, factor = bounded(batch.weights[0], scale.max_norm)
        return factor * self.shares.gradients(cotangent, _at_zero(batch), pool)

    def _check_members(self, operators: int) -> None:
        """Raises `SingleOperator` if both halves of a pad would meet."""
        if operators < MEMBERS and not self.shares.allow_single_operator:
            raise SingleOperator(
                f"A padded adapter needs {MEMBERS} operators that don't collude; {operators} is given.",
                remedy="Add an operator (--server); this holds for predictions too.",
            )

    def _record(self, batch: RemoteBatch, pool: OperatorPool, identity: str, scale: PadScale) -> None:
        """Counts the adapter, before it is sent."""
        if len(batch.operators) < MEMBERS:
            self.ledger.met = True
            return
        with self._lock:
            if self._exceeds(batch, pool, identity, scale):
                raise BudgetSpent(
                    f"The budget of {self.max_nats:.3g} nats is made for {self.views} adapters; they have been sent.",
                    remedy=SPENT,
                )
            for operator in self._members(batch, pool):
                self.ledger.record(operator, identity, scale.nats)

    def _check_room(self, batch: RemoteBatch, pool: OperatorPool, scale: PadScale) -> None:
        """Raises `BudgetSpent` if the adapter that a step leads to could never be sent, not even to predict."""
        if not self.ledger.met and self._exceeds(batch, pool, "the next", scale):
            raise BudgetSpent(
                f"The run was planned for {self.views - 1} steps, and its budget of {self.max_nats:.3g} nats is spent.",
                remedy=SPENT,
            )

    def _exceeds(self, batch: RemoteBatch, pool: OperatorPool, identity: str, scale: PadScale) -> bool:
        spent = max(self.ledger.after(operator, identity, scale.nats) for operator in self._members(batch, pool))
        return spent > self.max_nats * (1 + 1e-9)

    @staticmethod
    def _members(batch: RemoteBatch, pool: OperatorPool) -> list[str]:
        """Addresses of the two operators that see the adapter."""
        return [pool.operators[index].transport.url for index in batch.operators[:MEMBERS]]


def _at_zero(batch: RemoteBatch) -> RemoteBatch:
    """The same texts under the public adapter that changes nothing."""
    return batch.with_weights(torch.zeros_like(batch.weights[:1]))
