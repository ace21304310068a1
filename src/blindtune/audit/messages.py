"""The calls of a recording: when each happened, and which shares belong to one gradient.

The *moment* of a call is the number of the newest adapters that had been received when it came. Most methods train
the adapters that they send, so a moment is a training step. Others take all gradients under one public adapter, which
*stands still* while others move past it. So adapters alone don't say when.

Shares are of one gradient if they came for one batch under the same adapters and

- at one operator: no new adapters came between them (one *visit*);
- at several: each operator gives one visit. Visits with the fewest new adapters between them are put together first,
  of those the ones with the least time between. Clocks differ, so some new adapters may come between; but under
  adapters that stand still at most `APART`, since the same batch comes again in another epoch with another gradient.
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
"""The adapters of one call by content, in the order of the request."""

APART = 4
"""Two steps of a method that sends new adapters to each of two operators."""


@dataclass(frozen=True)
class Message:
    """A forward or backward call with what it carried, and whom it was sent to."""

    time: float
    kind: Literal["forward", "backward"]
    adapters: Adapters
    rows: tuple[Row, ...]
    types: tuple[Row, ...]
    vectors: Features | None
    """Hidden states `(n, B, d)` that were sent back, or cotangents `(m, n, B, d)` that were received."""
    operator: str = ""


@dataclass(frozen=True)
class Meeting:
    """All distinct shares `(m, n, B, d)` of one gradient."""

    moment: int
    """When the last of them came."""
    adapters: Adapters
    rows: tuple[Row, ...]
    shares: Features


def read_message(event: Event, tensors: dict[str, Tensor], operator: str) -> Message:
    """A forward or backward event."""
    rows = _rows(tensors)
    name = "hidden" if event.kind == "forward" else "cotangents"
    vectors = tensors[name].float().numpy() if name in tensors else None
    kind = "forward" if event.kind == "forward" else "backward"
    ids, types = tuple(row for row, _ in rows), tuple(row_types for _, row_types in rows)
    return Message(event.time, kind, tuple(event.adapters), ids, types, vectors, operator)


def moments(calls: Sequence[Message]) -> list[int]:
    """For each call how many different adapters had come before the newest; 0 where none had come."""
    seen: set[Adapters] = set()
    found: list[int] = []
    for call in calls:
        if call.adapters:
            seen.add(call.adapters)
        found.append(max(0, len(seen) - 1))
    return found


def meetings(calls: Sequence[Message]) -> tuple[list[Meeting], set[Adapters]]:
    """The shares of every gradient, in the order of moments, and the adapters that stand still.

    A message that was sent again adds nothing.
    """
    visits = _visits(calls)
    places: dict[tuple[Adapters, str], set[int]] = {}
    for (adapters, _), found in visits.items():
        for visit in found:
            places.setdefault((adapters, visit.operator), set()).add(visit.received)
    standing = {adapters for (adapters, _), received in places.items() if len(received) > 1}
    met: list[Meeting] = []
    for (adapters, rows), found in visits.items():
        for group in _grouped(found, APART if adapters in standing else None):
            shares = np.stack([share for visit in group for share in visit.shares.values()])
            met.append(Meeting(max(visit.moment for visit in group), adapters, rows, shares))
    return sorted(met, key=lambda meeting: meeting.moment), standing


@dataclass
class _Visit:
    """Shares for one batch under one set of adapters that came to one operator, with no new adapters in between."""

    operator: str
    received: int
    """How many different sets of adapters the operator had."""
    time: float
    moment: int
    shares: dict[bytes, Features] = field(default_factory=dict[bytes, Features])


def _visits(calls: Sequence[Message]) -> dict[tuple[Adapters, tuple[Row, ...]], list[_Visit]]:
    """In the order of time."""
    found: dict[tuple[Adapters, tuple[Row, ...]], list[_Visit]] = {}
    seen: dict[str, set[Adapters]] = {}
    for call, moment in zip(calls, moments(calls), strict=True):
        mine = seen.setdefault(call.operator, set())
        if call.adapters:
            mine.add(call.adapters)
        if call.kind != "backward" or call.vectors is None:
            continue
        visits = found.setdefault((call.adapters, call.rows), [])
        for share in call.vectors:
            content = share.tobytes()
            if any(content in visit.shares for visit in visits):
                continue
            place = (call.operator, len(mine))
            visit = next((v for v in reversed(visits) if (v.operator, v.received) == place), None)
            if visit is None:
                visit = _Visit(*place, call.time, moment)
                visits.append(visit)
            visit.shares[content], visit.moment = share, moment
    return found


def _grouped(visits: list[_Visit], apart: int | None) -> list[list[_Visit]]:
    """Visits of different operators that belong together; at most `apart` new adapters between any two, if given."""

    def pairs() -> Iterator[tuple[int, float, int, int]]:
        for later, visit in enumerate(visits):
            for earlier in range(later - 1, -1, -1):
                between = abs(visit.moment - visits[earlier].moment)
                if apart is not None and between > apart:
                    break
                yield between, visit.time - visits[earlier].time, earlier, later

    group_of = {index: [visit] for index, visit in enumerate(visits)}
    for _, _, earlier, later in sorted(pairs()):
        one, other = group_of[earlier], group_of[later]
        if {visit.operator for visit in one}.isdisjoint(visit.operator for visit in other):
            one += other
            group_of = {index: one if group is other else group for index, group in group_of.items()}
    return list({id(group): group for group in group_of.values()}.values())


def _rows(tensors: dict[str, Tensor]) -> list[tuple[Row, Row]]:
    ids, lengths, types = tensors["input_ids"], tensors["lengths"].tolist(), tensors.get("token_type_ids")
    listed = ids.tolist()
    listed_types = types.tolist() if types is not None else [[0] * ids.shape[1]] * len(listed)
    return [(tuple(r[:n]), tuple(t[:n])) for r, t, n in zip(listed, listed_types, lengths, strict=True)]
