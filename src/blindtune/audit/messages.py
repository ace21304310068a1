"""Reads the calls of a recording: determines the step of each call, and which shares belong to one gradient.

The *step* of a call is the position, from 0, of the newest adapters that had been received before it. Most methods
train the adapters that they send, so this is a training step. Other methods take all gradients under one public set of
adapters, which is *fixed* while the other adapters change. Therefore the adapters of a call alone don't give its step.

Shares belong to one gradient if they were sent for one batch, under the same adapters, and

- to one operator, without new adapters between them (one *exchange*);
- or to several operators, in one exchange with each. Exchanges with the fewest new adapters between them are grouped
  first, and of these, those with the least time between them. Clocks of operators differ, so some new adapters may
  come between two exchanges of a group. If the adapters are fixed, these may be at most `MAX_STEPS_APART`, because the
  same batch returns in another epoch with another gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from blindtune.wire import Event

Row = tuple[int, ...]
"""Token ids of one text, without padding."""
Features = NDArray[np.float32]
Adapters = tuple[str, ...]
"""Content hashes of the adapters of one call, in the order of the request."""
Batch = tuple[Adapters, tuple[Row, ...]]
"""The adapters and the texts of a call."""

MAX_STEPS_APART = 4
"""Number of new adapters in two steps of a method that sends different adapters to each of two operators."""


@dataclass(frozen=True)
class Message:
    """Holds a forward or backward call with its vectors, and the operator that received it."""

    time: float
    kind: Literal["forward", "backward"]
    adapters: Adapters
    rows: tuple[Row, ...]
    types: tuple[Row, ...]
    vectors: Features | None
    """Hidden states `(n, B, d)` that were sent back, or cotangents `(m, n, B, d)` that were received."""
    operator: str = ""


@dataclass(frozen=True)
class ShareGroup:
    """Holds all distinct shares `(m, n, B, d)` of one gradient: cotangents for one batch under one set of adapters.

    Attributes:
        step: step of the last share.
    """

    step: int
    rows: tuple[Row, ...]
    shares: Features
    adapters: Adapters


def read_message(event: Event, tensors: dict[str, Tensor], operator: str) -> Message:
    """Returns a forward or backward event as a message."""
    rows = _rows(tensors)
    name = "hidden" if event.kind == "forward" else "cotangents"
    vectors = tensors[name].float().numpy() if name in tensors else None
    kind = "forward" if event.kind == "forward" else "backward"
    ids, types = tuple(row for row, _ in rows), tuple(row_types for _, row_types in rows)
    return Message(event.time, kind, tuple(event.adapters), ids, types, vectors, operator)


def call_steps(calls: Sequence[Message]) -> list[int]:
    """Returns the step of each call: the number of distinct adapters that had been received before the newest."""
    received: set[Adapters] = set()
    steps: list[int] = []
    for call in calls:
        if call.adapters:
            received.add(call.adapters)
        steps.append(max(0, len(received) - 1))
    return steps


def share_groups(calls: Sequence[Message]) -> tuple[list[ShareGroup], set[Adapters]]:
    """Returns the shares of every gradient, in the order of steps, and the adapters that are fixed.

    A message that was sent twice counts once.
    """
    exchanges_of = _exchanges(calls)
    positions: dict[tuple[Adapters, str], set[int]] = {}
    for (adapters, _), exchanges in exchanges_of.items():
        for exchange in exchanges:
            positions.setdefault((adapters, exchange.operator), set()).add(exchange.received)
    fixed = {adapters for (adapters, _), received in positions.items() if len(received) > 1}
    groups: list[ShareGroup] = []
    for (adapters, rows), exchanges in exchanges_of.items():
        for group in _grouped(exchanges, MAX_STEPS_APART if adapters in fixed else None):
            shares = np.stack([share for exchange in group for share in exchange.shares.values()])
            groups.append(ShareGroup(max(exchange.step for exchange in group), rows, shares, adapters))
    return sorted(groups, key=lambda group: group.step), fixed


@dataclass
class _Exchange:
    """Holds shares for one batch under one set of adapters that one operator received between two new adapters.

    Attributes:
        received: number of distinct sets of adapters that the operator had received.
        step: step of the last share.
        shares: each distinct share, by its bytes.
    """

    operator: str
    received: int
    time: float
    step: int
    shares: dict[bytes, Features] = field(default_factory=dict[bytes, Features])


def _exchanges(calls: Sequence[Message]) -> dict[Batch, list[_Exchange]]:
    """Returns the exchanges of each batch, in the order of time."""
    exchanges_of: dict[Batch, list[_Exchange]] = {}
    received_by: dict[str, set[Adapters]] = {}
    for call, step in zip(calls, call_steps(calls), strict=True):
        received = received_by.setdefault(call.operator, set())
        if call.adapters:
            received.add(call.adapters)
        if call.kind != "backward" or call.vectors is None:
            continue
        exchanges = exchanges_of.setdefault((call.adapters, call.rows), [])
        for share in call.vectors:
            content = share.tobytes()
            if any(content in exchange.shares for exchange in exchanges):
                continue
            exchange = _latest(exchanges, call.operator, len(received))
            if exchange is None:
                exchange = _Exchange(call.operator, len(received), call.time, step)
                exchanges.append(exchange)
            exchange.shares[content] = share
            exchange.step = step
    return exchanges_of


def _latest(exchanges: Sequence[_Exchange], operator: str, received: int) -> _Exchange | None:
    """Returns the last exchange with this operator since it received its newest adapters, if there is one."""
    for exchange in reversed(exchanges):
        if exchange.operator == operator and exchange.received == received:
            return exchange
    return None


def _grouped(exchanges: list[_Exchange], max_steps: int | None) -> list[list[_Exchange]]:
    """Groups exchanges with different operators that belong together.

    Args:
        max_steps: maximum number of new adapters between two exchanges of a group; no limit if None.
    """

    def pairs() -> Iterator[tuple[int, float, int, int]]:
        for later, exchange in enumerate(exchanges):
            for earlier in range(later - 1, -1, -1):
                between = abs(exchange.step - exchanges[earlier].step)
                if max_steps is not None and between > max_steps:
                    break
                yield between, exchange.time - exchanges[earlier].time, earlier, later

    group_of = list(range(len(exchanges)))  # the number of the group of each exchange
    members = {number: [exchange] for number, exchange in enumerate(exchanges)}
    for _, _, earlier, later in sorted(pairs()):
        kept, merged = group_of[earlier], group_of[later]
        operators = {exchange.operator for exchange in members[kept]}
        if operators.isdisjoint(exchange.operator for exchange in members[merged]):
            members[kept] += members.pop(merged)
            group_of = [kept if number == merged else number for number in group_of]
    return [members[number] for number in dict.fromkeys(group_of)]


def _rows(tensors: dict[str, Tensor]) -> list[tuple[Row, Row]]:
    """Returns token ids and token types of each text, without padding."""
    ids, lengths, types = tensors["input_ids"], tensors["lengths"].tolist(), tensors.get("token_type_ids")
    listed = ids.tolist()
    listed_types = types.tolist() if types is not None else [[0] * ids.shape[1]] * len(listed)
    return [(tuple(r[:n]), tuple(t[:n])) for r, t, n in zip(listed, listed_types, lengths, strict=True)]
