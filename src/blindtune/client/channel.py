"""Channels: the exchange of adapters, hidden states and gradients between the client and its operators.

A `Backbone` has texts and adapters; its `Channel` decides what each operator is sent. Training methods have channels
that hide gradients or adapters; `PlainChannel` hides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Protocol

from torch import Tensor

from blindtune.client.operators import OperatorPool, Upload
from blindtune.models import Tokens
from blindtune.models.tokenizer import TokenRow
from blindtune.wire import LoraSpec, NoiseShare, Readout


@dataclass(frozen=True, eq=False)
class RemoteBatch:
    """A batch of B texts and the weights of n adapters, for one pass.

    Attributes:
        rows: the tokenized texts.
        tokens: the same texts as a padded batch.
        model: name of the hosted model.
        spec: layers and hyperparameters of the adapters, equal for all n.
        weights: the client's weights of the adapters, `(n, P)` float32.
        seed: seed of dropout, which is off without one.
        operators: indices of the operators that take part in the pass.
        version: `Backbone.version` when the batch was made.
    """

    rows: tuple[TokenRow, ...]
    tokens: Tokens
    model: str
    spec: LoraSpec
    weights: Tensor
    readout: Readout
    seed: int | None
    operators: tuple[int, ...]
    version: tuple[int, ...] = ()

    @cached_property
    def uploads(self) -> tuple[Upload, ...]:
        """The adapters as they are uploaded."""
        return tuple(Upload.of(self.model, self.spec, weights) for weights in self.weights)

    def with_weights(self, weights: Tensor) -> RemoteBatch:
        """Returns a batch of the same texts with other adapter weights."""
        return replace(self, weights=weights)

    def forward(self, pool: OperatorPool, operator: int, *, retain: bool = False) -> Tensor:
        """Returns hidden states `(n, B, ...)` from one operator.

        Args:
            retain: whether the operator keeps the autograd graph for a following `backward`.
        """
        return pool.operators[operator].forward(self.tokens, self.uploads, self.readout, self.seed, retain=retain)

    def compute(self, pool: OperatorPool, operator: int) -> None:
        """Makes one operator compute the forward pass and keep its graph for a following `backward`."""
        pool.operators[operator].compute(self.tokens, self.uploads, self.readout, self.seed)

    def backward(self, pool: OperatorPool, operator: int, cotangents: Tensor | NoiseShare) -> Tensor:
        """Returns gradients `(m, n, P)` from one operator for cotangents `(m, n, B, ...)` or one share of noise."""
        return pool.operators[operator].backward(self.tokens, self.uploads, self.readout, self.seed, cotangents)


class Channel(Protocol):
    """Decides what each operator is sent, and combines their answers."""

    def choose(self, operators: int, step: int) -> tuple[int, ...]:
        """Returns the indices of the operators, below `operators`, that take part in this training step."""
        ...

    def holders(self, operators: int, step: int) -> tuple[int, ...]:
        """Returns those operators of `choose` that receive adapters in this step."""
        ...

    def teams(self, operators: int) -> list[tuple[int, ...]]:
        """Returns disjoint groups of operators that can each compute a pass without gradient, in parallel."""
        ...

    def hidden(self, batch: RemoteBatch, pool: OperatorPool, *, retain: bool) -> Tensor:
        """Returns the hidden states `(n, B, ...)` of a batch.

        Args:
            retain: whether a call of `gradients` with the same batch will follow.
        """
        ...

    def gradients(self, cotangent: Tensor, batch: RemoteBatch, pool: OperatorPool) -> Tensor:
        """Returns the gradients of the adapters' weights `(n, P)` for a cotangent `(n, B, ...)`."""
        ...


class PlainChannel:
    """Sends adapters and true gradients in the clear, each step to the next operator in turn. No label privacy."""

    def choose(self, operators: int, step: int) -> tuple[int, ...]:
        """Returns one operator, the next in turn."""
        return (step % operators,)

    def holders(self, operators: int, step: int) -> tuple[int, ...]:
        """Returns the operator of the step."""
        return self.choose(operators, step)

    def teams(self, operators: int) -> list[tuple[int, ...]]:
        """Returns each operator as a team of one."""
        return [(index,) for index in range(operators)]

    def hidden(self, batch: RemoteBatch, pool: OperatorPool, *, retain: bool) -> Tensor:
        """Returns the first operator's hidden states. With `retain`, all operators of the batch keep the graph."""
        first = batch.operators[0]

        def run(operator: int) -> list[Tensor]:
            if operator == first:
                return [batch.forward(pool, operator, retain=retain)]
            batch.compute(pool, operator)
            return []

        operators = batch.operators if retain else (first,)
        (hidden,), *_ = pool.parallel([partial(run, operator) for operator in operators])
        return hidden

    def gradients(self, cotangent: Tensor, batch: RemoteBatch, pool: OperatorPool) -> Tensor:
        """Returns the gradients `(n, P)` from the first operator."""
        return batch.backward(pool, batch.operators[0], cotangent.unsqueeze(0))[0]
