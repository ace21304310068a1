"""How hidden states and gradients of one batch travel between the client and its operators.

A `Backbone` knows texts and adapters; its `Channel` decides which operator is sent what. Methods bring channels of
their own that hide gradients or adapters; `PlainChannel` hides nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from torch import Tensor

from blindtune.client.operators import OperatorPool, Upload
from blindtune.models import Tokens
from blindtune.models.tokenizer import TokenRow
from blindtune.wire import LoraSpec, NoiseShare, Pooling


@dataclass(frozen=True, eq=False)
class RemoteBatch:
    """One pass over B texts with n adapters.

    Attributes:
        model: the hosted name.
        spec: what the adapters change; all n have the same.
        weights: `(n, P)` float32, as the client holds them.
        seed: of dropout; none without.
        operators: who takes part.
        version: changes whenever an optimizer steps or the adapters are written to, also if their values stay the same.
    """

    rows: tuple[TokenRow, ...]
    tokens: Tokens
    model: str
    spec: LoraSpec
    weights: Tensor
    pooling: Pooling
    seed: int | None
    operators: tuple[int, ...]
    version: tuple[int, ...] = ()

    @cached_property
    def uploads(self) -> tuple[Upload, ...]:
        """The adapters as they travel."""
        return tuple(Upload.of(self.model, self.spec, weights) for weights in self.weights)

    def with_weights(self, weights: Tensor) -> RemoteBatch:
        """The same texts under other adapters."""
        return replace(self, weights=weights)

    def forward(self, pool: OperatorPool, operator: int, *, retain: bool = False, want: bool = True) -> Tensor | None:
        """Hidden states `(n, B, ...)` from one operator; None if it was only to compute and retain them."""
        return pool.operators[operator].forward(
            self.tokens, self.uploads, self.pooling, self.seed, retain=retain, want_hidden=want
        )

    def backward(self, pool: OperatorPool, operator: int, cotangents: Tensor | NoiseShare) -> Tensor:
        """Gradients `(m, n, P)` from one operator for cotangents `(m, n, B, ...)`, or for one that is noise alone."""
        return pool.operators[operator].backward(self.tokens, self.uploads, self.pooling, self.seed, cotangents)


class Channel(Protocol):
    """What a batch's operators are sent."""

    def choose(self, operators: int, step: int) -> tuple[int, ...]:
        """Which of so many operators take part in this training step."""
        ...

    def teams(self, operators: int) -> list[tuple[int, ...]]:
        """Disjoint groups that can each answer a pass without gradient, at the same time."""
        ...

    def hidden(self, batch: RemoteBatch, pool: OperatorPool, *, retain: bool) -> Tensor:
        """Hidden states `(n, B, ...)`. `retain`: `gradients` will be asked for the same batch."""
        ...

    def gradients(self, cotangent: Tensor, batch: RemoteBatch, pool: OperatorPool) -> Tensor:
        """Parameter gradients `(n, P)` for a cotangent `(n, B, ...)`."""
        ...


class PlainChannel:
    """Adapters and true gradients, in the clear, to one operator after the other. No label privacy."""

    def choose(self, operators: int, step: int) -> tuple[int, ...]:
        return (step % operators,)

    def teams(self, operators: int) -> list[tuple[int, ...]]:
        return [(index,) for index in range(operators)]

    def hidden(self, batch: RemoteBatch, pool: OperatorPool, *, retain: bool) -> Tensor:
        """All operators of the batch compute, and keep the graph if asked; the first one sends hidden states."""

        def call(index: int) -> Callable[[], Tensor | None]:
            first = index == batch.operators[0]
            return lambda: batch.forward(pool, index, retain=retain, want=first)

        hidden = pool.parallel([call(index) for index in (batch.operators if retain else batch.operators[:1])])[0]
        assert hidden is not None  # noqa: S101 - it was asked for
        return hidden

    def gradients(self, cotangent: Tensor, batch: RemoteBatch, pool: OperatorPool) -> Tensor:
        return batch.backward(pool, batch.operators[0], cotangent.unsqueeze(0))[0]
