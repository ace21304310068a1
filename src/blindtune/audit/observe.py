"""What a server can compute from what it saw: activations and shifts of every text under every adapter it received.

The server keeps all texts and all adapters θ_t. At any later moment it can run each text that it has seen through
the adapters of any step, so it isn't bound to the (x, θ) pairs that were sent together.

Attacks observe one of four things, each a part of a `View`:

| what | where |
|---|---|
| vectors of one channel, one for each text | `Sighting`, or recomputed (`Recomputation`) |
| averages of adapters, as if they had been received | `Mean`, recomputed |
| the shares of one gradient | `Gradients` |
| consecutive adapters, with the texts between | `Update` |
| the views of several operators | `join_views`, which gives a view with more of the above |

Every step is a moment: how many different adapters had come before the newest (`blindtune.audit.messages`). A
checkpoint that *stands still* (all gradients are taken under it, while others move past it) is neither a look nor
part of an update.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from blindtune.audit.messages import Adapters, Features, Message, Row, meetings, moments, read_message
from blindtune.errors import TranscriptError
from blindtune.wire import Event, LoraSpec, Pooling, Transcript


@dataclass(frozen=True)
class Mean:
    """A synthetic adapter: the average of some that were received."""

    of: tuple[str, ...]


@dataclass(frozen=True)
class Shuffled:
    """A synthetic adapter that knows nothing: the weights of a received one, in random order within each matrix."""

    of: str


Adapter = str | Mean | Shuffled
"""Something with weights: an adapter's content hash, what an attacker makes of several, or a control."""


@dataclass(frozen=True)
class Checkpoint:
    """Adapters that one call was made with, by content, in the order of the request."""

    adapters: Adapters
    step: int
    """Position among the distinct sets of adapters that this server received, from 0."""

    @property
    def shuffled(self) -> tuple[Shuffled, ...]:
        """Adapters of the same size that know nothing."""
        return tuple(Shuffled(name) for name in self.adapters)


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
    adapters: Adapters


@dataclass(frozen=True)
class Update:
    """One optimizer step as a server sees it: θ_t, θ_{t+1}, and the texts whose gradients came between."""

    step: int
    rows: tuple[Row, ...]
    before: Adapters
    after: Adapters
    at: Adapters
    """Where the gradient was taken: θ_t, or adapters that stand still."""


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
    moving: list[Checkpoint] = field(default_factory=list[Checkpoint])
    """Those that don't stand still; all if there are no others."""
    received: dict[Adapters, dict[str, float]] = field(default_factory=dict[Adapters, dict[str, float]])
    """Adapters -> the operators that got them, and when each did first. In a view that isn't joined there is one."""
    sightings: list[Sighting] = field(default_factory=list[Sighting])
    gradients: list[Gradients] = field(default_factory=list[Gradients])

    def __post_init__(self) -> None:
        met, standing = meetings(self.calls)
        for call, step in zip(self.calls, moments(self.calls), strict=True):
            if call.adapters:
                if call.adapters not in self.received:
                    self.checkpoints.append(Checkpoint(call.adapters, step))
                self.received.setdefault(call.adapters, {}).setdefault(call.operator, call.time)
            for row, row_types in zip(call.rows, call.types, strict=True):
                self.types.setdefault(row, row_types)
                self.first_seen.setdefault(row, step)
            if call.kind == "forward" and call.adapters and call.vectors is not None:
                where = " at the base" if call.adapters in standing else ""
                channels = {f"sent activation {i}{where}": vectors for i, vectors in enumerate(call.vectors)}
                self.sightings.append(Sighting(step, call.rows, channels))
        self.moving = [c for c in self.checkpoints if c.adapters not in standing] or self.checkpoints
        for found in met:
            self.gradients.append(Gradients(found.moment, found.rows, found.shares, found.adapters))
            self.sightings.append(Sighting(found.moment, found.rows, _gradient_channels(found.shares)))

    @property
    def messages(self) -> int:
        return len(self.calls)

    def rows_until(self, step: int) -> list[Row]:
        """Texts that the server had seen when it received the adapters of `step`."""
        return [row for row, first in self.first_seen.items() if first <= step]

    def updates(self) -> list[Update]:
        """Consecutive checkpoints of one operator with gradients for one batch between them.

        Those are gradients at the first of the two, or at adapters that stand still. A server can't know whether the
        client took further steps with other operators in between.
        """
        moving = {checkpoint.adapters for checkpoint in self.moving}
        own: dict[Adapters, set[tuple[Adapters, tuple[Row, ...]]]] = {}
        standing: dict[int, set[tuple[Adapters, tuple[Row, ...]]]] = {}
        for found in self.gradients:
            batch = (found.adapters, found.rows)
            if found.adapters in moving:
                own.setdefault(found.adapters, set()).add(batch)
            else:
                standing.setdefault(found.step, set()).add(batch)
        updates: list[Update] = []
        for index, now in enumerate(self.moving):
            mine = self.received[now.adapters].keys()
            after = next((c for c in self.moving[index + 1 :] if mine & self.received[c.adapters].keys()), None)
            if after is not None:
                between = [standing.get(step, set()) for step in range(now.step, after.step)]
                batches = own.get(now.adapters, set()).union(*between)
                if len(batches) == 1:
                    at, rows = batches.pop()
                    updates.append(Update(now.step, rows, now.adapters, after.adapters, at))
        return updates

    def adapter(self, name: str | Mean) -> Tensor:
        """Weights `(P,)` of the adapter with this content hash, or of an average.

        Raises:
            TranscriptError: its upload is not in the recording.
        """
        return self.load([name])[name]

    def load(self, names: Iterable[str | Mean]) -> dict[str | Mean, Tensor]:
        """Weights `(P,)` of several adapters; each recorded one is read once, for itself and for all means of it.

        Raises:
            TranscriptError: an upload is not in the recording.
        """
        wanted = list(dict.fromkeys(names))
        means = [name for name in wanted if isinstance(name, Mean)]
        sums: list[Tensor | None] = [None] * len(means)
        uses: dict[str, list[int]] = {name: [] for name in wanted if isinstance(name, str)}
        for place, mean in enumerate(means):
            for name in mean.of:
                uses.setdefault(name, []).append(place)
        loaded: dict[str | Mean, Tensor] = dict.fromkeys(wanted, torch.empty(0))
        for name, places in uses.items():
            weights = self._stored(name)
            if name in loaded:
                loaded[name] = weights
            for place in places:
                total = sums[place]
                sums[place] = weights.to(torch.float64, copy=True) if total is None else total.add_(weights)
        for mean, total in zip(means, sums, strict=True):
            if total is not None:
                loaded[mean] = (total / len(mean.of)).to(torch.float32)
        return loaded

    def _stored(self, name: str) -> Tensor:
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
        [read_message(event, transcript.tensors(event), operator) for event in calls],
        {name: StoredWeights(transcript, event) for name, event in weights.items()},
    )


def join_views(views: Sequence[View]) -> View:
    """What operators know together if they collude: all texts, all adapters, and the shares that met.

    Messages are put in the order of the operators' clocks, and keep the name of their operator. Backward calls for the
    same texts under the same adapters carry shares of one gradient, whoever received them, unless they belong to
    different moments (`blindtune.audit.messages`).

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


def _pooling(value: str | None) -> Pooling:
    for pooling in ("cls", "mean", "last", "first"):
        if value == pooling:
            return pooling
    raise TranscriptError(f"The transcript has the pooling {value!r}.", remedy="Record it again.")


def _gradient_channels(shares: Features) -> dict[str, Features]:
    """`gradient i` from `(m, n, B, d)`, one for each share where there are several, and their joints over adapters."""
    channels: dict[str, Features] = {}
    for j, share in enumerate(shares):
        mark = f".{j}" if len(shares) > 1 else ""
        channels |= {f"gradient {i}{mark}": vectors for i, vectors in enumerate(share)}
        if len(share) > 1:
            channels[f"gradients joint{mark}"] = np.concatenate(list(share), axis=1)
    return channels
