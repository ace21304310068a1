"""What a server can compute from what it saw: activations and shifts of every text under every adapter it received.

The server keeps all texts and all adapters θ_t. At any later moment it can run each text that it has seen through
the adapters of any step, so it isn't bound to the (x, θ) pairs that were sent together.

Attacks observe one of four things, each a part of a `View`:

| what | where |
|---|---|
| vectors of one channel, one for each text | `Sighting`, or recomputed (`Recomputation`) |
| the shares of one backward call | `Gradients` |
| consecutive adapters, with the texts between | `Update` |
| the views of several operators | `join_views`, which gives a view with more of the above |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from blindtune.errors import TranscriptError
from blindtune.wire import Event, LoraSpec, Pooling, Transcript

Row = tuple[int, ...]
"""Token ids of one text, without padding."""
Features = NDArray[np.float32]


@dataclass(frozen=True)
class Checkpoint:
    """The adapters of one training step, by content, in the order of the request."""

    adapters: tuple[str, ...]
    step: int
    """Position among the distinct sets of adapters that this server received, from 0."""


@dataclass(frozen=True)
class Sighting:
    """Vectors that travelled for the texts of one message: `(B, d)` for each named channel."""

    step: int
    rows: tuple[Row, ...]
    channels: dict[str, Features]


@dataclass(frozen=True)
class Gradients:
    """All distinct shares `(m, n, B, d)` of one gradient that met here: cotangents for one batch under one θ."""

    step: int
    rows: tuple[Row, ...]
    shares: Features


@dataclass(frozen=True)
class Update:
    """One optimizer step as a server sees it: θ_t, θ_{t+1}, and the texts whose gradients came between."""

    step: int
    rows: tuple[Row, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True)
class Message:
    """A forward or backward call with what it carried."""

    time: float
    kind: Literal["forward", "backward"]
    adapters: tuple[str, ...]
    rows: tuple[Row, ...]
    types: tuple[Row, ...]
    vectors: Features | None
    """Hidden states `(n, B, d)` that were sent back, or cotangents `(m, n, B, d)` that were received."""


@dataclass(frozen=True)
class StoredWeights:
    """Where an adapter's weights were recorded."""

    transcript: Transcript
    event: Event


@dataclass
class View:
    """One server's knowledge, in its own order: texts, checkpoints, and the vectors that it was sent or sent."""

    operator: str
    transcript: Transcript
    model: str
    pooling: Pooling
    spec: LoraSpec | None
    calls: list[Message]
    weights: dict[str, StoredWeights]
    types: dict[Row, Row] = field(default_factory=dict[Row, Row])
    """Texts in order of first sight, with their token types."""
    first_seen: dict[Row, int] = field(default_factory=dict[Row, int])
    """Text -> first step at which the server had it."""
    checkpoints: list[Checkpoint] = field(default_factory=list[Checkpoint])
    sightings: list[Sighting] = field(default_factory=list[Sighting])
    gradients: list[Gradients] = field(default_factory=list[Gradients])

    def __post_init__(self) -> None:
        seen: dict[tuple[str, ...], int] = {}
        step = 0
        for call in self.calls:
            if call.adapters:
                if call.adapters not in seen:
                    seen[call.adapters] = len(self.checkpoints)
                    self.checkpoints.append(Checkpoint(call.adapters, len(self.checkpoints)))
                step = seen[call.adapters]
            for row, row_types in zip(call.rows, call.types, strict=True):
                self.types.setdefault(row, row_types)
                self.first_seen.setdefault(row, step)
            if call.kind == "forward" and call.adapters and call.vectors is not None:
                channels = {f"sent activation {i}": vectors for i, vectors in enumerate(call.vectors)}
                self.sightings.append(Sighting(step, call.rows, channels))
        for (adapters, rows), shares in _meetings(self.calls).items():
            found = Gradients(seen[adapters], rows, shares)
            self.gradients.append(found)
            self.sightings.append(Sighting(found.step, rows, _gradient_channels(shares)))

    @property
    def messages(self) -> int:
        return len(self.calls)

    def rows_until(self, step: int) -> list[Row]:
        """Texts that the server had seen when it received the adapters of `step`."""
        return [row for row, first in self.first_seen.items() if first <= step]

    def updates(self) -> list[Update]:
        """Consecutive checkpoints of this server with gradients for one batch between them.

        A server can't know whether the client took further steps with other operators in between.
        """
        batches: dict[int, set[tuple[Row, ...]]] = {}
        for found in self.gradients:
            batches.setdefault(found.step, set()).add(found.rows)
        return [
            Update(now.step, next(iter(batches[now.step])), now.adapters, after.adapters)
            for now, after in zip(self.checkpoints, self.checkpoints[1:], strict=False)
            if len(batches.get(now.step, ())) == 1
        ]

    def adapter(self, name: str) -> Tensor:
        """Weights `(P,)` of the adapter with this content hash.

        Raises:
            TranscriptError: its upload is not in the recording.
        """
        stored = self.weights.get(name)
        if stored is None:
            raise TranscriptError(f"The adapter {name[:12]}… was used but not recorded.", remedy="Record a whole run.")
        return stored.transcript.tensors(stored.event)["weights"]


def read_view(transcript: Transcript, operator: str, tenant: str | None = None) -> View:
    """Replays what one tenant sent.

    Raises:
        TranscriptError: nothing in it to attack, or several tenants, models or runs in one recording.
    """
    tenants = sorted({event.tenant for event in transcript.events})
    if tenant is None and len(tenants) > 1:
        raise TranscriptError(
            f"{transcript.folder} holds messages of {len(tenants)} tenants: {', '.join(tenants)}.",
            remedy="Name one of them with --tenant.",
        )
    events = [event for event in transcript.events if tenant in (None, event.tenant)]
    calls = [event for event in events if event.kind in ("forward", "backward")]
    models = {event.model for event in calls}
    if len(models) != 1:
        raise TranscriptError(
            f"{transcript.folder} holds calls for {len(models)} models: {sorted(models)}.",
            remedy="Record one model with at least one client.",
        )
    poolings = {event.pooling for event in calls}
    if len(poolings) != 1 or "none" in poolings:
        raise TranscriptError(
            f"{transcript.folder} holds poolings {sorted(str(p) for p in poolings)}.",
            remedy="The label audit needs one pooled vector for each text.",
        )
    weights = {event.adapters[0]: event for event in events if event.kind == "adapter"}
    specs = [event.spec for event in weights.values()]
    if any(spec != specs[0] for spec in specs) or len({len(event.adapters) for event in calls if event.adapters}) > 1:
        raise TranscriptError(
            f"{transcript.folder} holds adapters of different shapes or numbers, so several runs.",
            remedy="Record every run into a folder of its own (restart the server with another --record).",
        )
    return View(
        operator,
        transcript,
        models.pop(),
        _pooling(poolings.pop()),
        specs[0] if specs else None,
        [_message(event, transcript.tensors(event)) for event in calls],
        {name: StoredWeights(transcript, event) for name, event in weights.items()},
    )


def join_views(views: Sequence[View]) -> View:
    """What operators know together if they collude: all texts, all adapters, and the shares that met.

    Messages are put in the order of the operators' clocks. Backward calls for the same texts under the same adapters
    carry shares of one gradient, whoever received them.

    Raises:
        TranscriptError: the operators didn't serve one and the same run.
    """
    first = views[0]
    names = " + ".join(view.operator for view in views)
    if any((view.pooling, view.spec) != (first.pooling, first.spec) for view in views):
        raise TranscriptError(
            f"{names} recorded adapters of different shapes, so several runs.",
            remedy="Name transcripts of one run with --collude.",
        )
    calls = sorted((call for view in views for call in view.calls), key=lambda call: call.time)
    weights = {name: stored for view in views for name, stored in view.weights.items()}
    return View(names, first.transcript, first.model, first.pooling, first.spec, calls, weights)


def _message(event: Event, tensors: dict[str, Tensor]) -> Message:
    rows = _rows(tensors)
    name = "hidden" if event.kind == "forward" else "cotangents"
    vectors = tensors[name].float().numpy() if name in tensors else None
    kind = "forward" if event.kind == "forward" else "backward"
    ids, types = tuple(row for row, _ in rows), tuple(row_types for _, row_types in rows)
    return Message(event.time, kind, tuple(event.adapters), ids, types, vectors)


def _meetings(calls: Sequence[Message]) -> dict[tuple[tuple[str, ...], tuple[Row, ...]], Features]:
    """Shares `(m, n, B, d)` of each gradient; a message that was sent again adds nothing."""
    found: dict[tuple[tuple[str, ...], tuple[Row, ...]], dict[bytes, Features]] = {}
    for call in calls:
        if call.kind == "backward" and call.vectors is not None:
            shares = found.setdefault((call.adapters, call.rows), {})
            for share in call.vectors:
                shares.setdefault(share.tobytes(), share)
    return {key: np.stack(list(shares.values())) for key, shares in found.items()}


def _pooling(value: str | None) -> Pooling:
    for pooling in ("cls", "mean", "last", "first"):
        if value == pooling:
            return pooling
    raise TranscriptError(f"The transcript has the pooling {value!r}.", remedy="Record it again.")


def _rows(tensors: dict[str, Tensor]) -> list[tuple[Row, Row]]:
    ids, lengths, types = tensors["input_ids"], tensors["lengths"].tolist(), tensors.get("token_type_ids")
    listed = ids.tolist()
    listed_types = types.tolist() if types is not None else [[0] * ids.shape[1]] * len(listed)
    return [(tuple(r[:n]), tuple(t[:n])) for r, t, n in zip(listed, listed_types, lengths, strict=True)]


def _gradient_channels(shares: Features) -> dict[str, Features]:
    """`gradient i` from `(m, n, B, d)`, one for each share where there are several, and their joints over adapters."""
    channels: dict[str, Features] = {}
    for j, share in enumerate(shares):
        mark = f".{j}" if len(shares) > 1 else ""
        channels |= {f"gradient {i}{mark}": vectors for i, vectors in enumerate(share)}
        if len(share) > 1:
            channels[f"gradients joint{mark}"] = np.concatenate(list(share), axis=1)
    return channels
