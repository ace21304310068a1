"""Builds the view of a server: the texts, adapters and vectors that it received, sent, or can compute.

A server keeps all texts and all adapters θ_t. It can later run each text through the adapters of any step, so it isn't
limited to the pairs (x, θ) that were sent together.

Attacks observe parts of a `View`:

| what | where |
|---|---|
| vectors of one channel, one for each text | `Sighting`, or recomputed (`Recomputation`) |
| averages of adapters, as if they had been received | `Mean`, recomputed |
| the shares of one gradient | `ShareGroup` |
| consecutive adapters, with the texts between them | `Update` |
| the views of several operators | `join_views`, which gives a view with more of the above |

A step is the position of the newest adapters among all distinct ones (`blindtune.audit.messages`). A checkpoint that is
*fixed* (the client takes all gradients under it, while the other adapters change) is neither a snapshot nor part of an
update.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from blindtune.audit.channel_id import JOINT, ChannelId, ChannelKind
from blindtune.audit.messages import (
    Adapters,
    Batch,
    Features,
    Message,
    Row,
    ShareGroup,
    call_steps,
    read_message,
    share_groups,
)
from blindtune.errors import TranscriptError
from blindtune.wire import Event, LoraSpec, Readout, Transcript

AT_THE_BASE = "at the base"
"""Modifier of the channels of activations under fixed adapters."""


@dataclass(frozen=True)
class Mean:
    """Identifies a synthetic adapter: the average of several received adapters."""

    of: tuple[str, ...]


@dataclass(frozen=True)
class Shuffled:
    """Identifies the adapter of a control: a received adapter with the weights of each matrix in random order."""

    of: str


Adapter = str | Mean | Shuffled
"""The content hash of a received adapter, an average of received adapters, or a control."""


@dataclass(frozen=True)
class Checkpoint:
    """Identifies the adapters of a call by content hash, in the order of the request."""

    adapters: Adapters
    step: int
    """Position, from 0, among the distinct sets of adapters that this server received."""

    @property
    def shuffled(self) -> tuple[Shuffled, ...]:
        """Returns the control adapters: the same weights, in random order."""
        return tuple(Shuffled(name) for name in self.adapters)


@dataclass(frozen=True)
class Sighting:
    """Holds the vectors that one message carried for its texts: `(B, d)` for each channel."""

    step: int
    rows: tuple[Row, ...]
    channels: dict[ChannelId, Features]


@dataclass(frozen=True)
class Update:
    """Describes one optimizer step as a server observes it: θ_t, θ_{t+1}, and the texts with gradients between them."""

    step: int
    rows: tuple[Row, ...]
    before: Adapters
    after: Adapters
    at: Adapters
    """The adapters at which the gradient was taken: θ_t, or fixed ones."""


@dataclass(frozen=True)
class StoredWeights:
    """Names the recorded event that holds an adapter's weights."""

    transcript: Transcript
    event: Event


@dataclass
class View:
    """Holds what one server knows, in the order in which it learned it: texts, checkpoints, and sent vectors."""

    operator: str
    transcript: Transcript
    model: str
    readout: Readout
    spec: LoraSpec | None
    calls: list[Message]
    weights: dict[str, StoredWeights]
    types: dict[Row, Row] = field(init=False, default_factory=dict[Row, Row])
    """Token types of each text, in the order in which the server first received the texts."""
    first_seen: dict[Row, int] = field(init=False, default_factory=dict[Row, int])
    """First step at which the server had received each text."""
    checkpoints: list[Checkpoint] = field(init=False, default_factory=list[Checkpoint])
    moving: list[Checkpoint] = field(init=False, default_factory=list[Checkpoint])
    """The checkpoints that aren't fixed; all checkpoints if every one is fixed."""
    received: dict[Adapters, dict[str, float]] = field(init=False, default_factory=dict[Adapters, dict[str, float]])
    """Time when each operator first received each set of adapters. A view that isn't joined has one operator."""
    sightings: list[Sighting] = field(init=False, default_factory=list[Sighting])
    gradients: list[ShareGroup] = field(init=False, default_factory=list[ShareGroup])

    def __post_init__(self) -> None:
        self.gradients, fixed = share_groups(self.calls)
        for call, step in zip(self.calls, call_steps(self.calls), strict=True):
            if call.adapters:
                if call.adapters not in self.received:
                    self.checkpoints.append(Checkpoint(call.adapters, step))
                self.received.setdefault(call.adapters, {}).setdefault(call.operator, call.time)
            for row, row_types in zip(call.rows, call.types, strict=True):
                self.types.setdefault(row, row_types)
                self.first_seen.setdefault(row, step)
            if call.kind == "forward" and call.adapters and call.vectors is not None:
                modifier = AT_THE_BASE if call.adapters in fixed else ""
                channels = {
                    ChannelId(ChannelKind.SENT_ACTIVATION, adapter=i, modifier=modifier): vectors
                    for i, vectors in enumerate(call.vectors)
                }
                self.sightings.append(Sighting(step, call.rows, channels))
        self.moving = [c for c in self.checkpoints if c.adapters not in fixed] or self.checkpoints
        for group in self.gradients:
            self.sightings.append(Sighting(group.step, group.rows, _gradient_channels(group.shares)))

    @property
    def messages(self) -> int:
        """Returns the number of recorded calls."""
        return len(self.calls)

    def rows_until(self, step: int) -> list[Row]:
        """Returns the texts that the server had received when it received the adapters of `step`."""
        return [row for row, first in self.first_seen.items() if first <= step]

    def updates(self) -> list[Update]:
        """Returns consecutive checkpoints of one operator with gradients for exactly one batch between them.

        The gradients were taken at the first of the two checkpoints, or at fixed adapters. A server can't know whether
        the client took further steps with other operators in between.
        """
        moving = {checkpoint.adapters for checkpoint in self.moving}
        own: dict[Adapters, set[Batch]] = {}
        fixed: dict[int, set[Batch]] = {}
        for group in self.gradients:
            batch = (group.adapters, group.rows)
            if group.adapters in moving:
                own.setdefault(group.adapters, set()).add(batch)
            else:
                fixed.setdefault(group.step, set()).add(batch)
        updates: list[Update] = []
        for index, now in enumerate(self.moving):
            after = self._next_of_same_operator(index)
            if after is None:
                continue
            between = [fixed.get(step, set()) for step in range(now.step, after.step)]
            batches = own.get(now.adapters, set()).union(*between)
            if len(batches) == 1:
                at, rows = batches.pop()
                updates.append(Update(now.step, rows, now.adapters, after.adapters, at))
        return updates

    def _next_of_same_operator(self, index: int) -> Checkpoint | None:
        """Returns the next moving checkpoint that an operator of checkpoint `index` received, if any."""
        operators = self.received[self.moving[index].adapters].keys()
        for checkpoint in self.moving[index + 1 :]:
            if operators & self.received[checkpoint.adapters].keys():
                return checkpoint
        return None

    def adapter(self, name: str | Mean) -> Tensor:
        """Returns weights `(P,)` of the adapter with this content hash, or of an average.

        Raises:
            TranscriptError: the recording lacks its upload.
        """
        return self.load([name])[name]

    def load(self, names: Iterable[str | Mean]) -> dict[str | Mean, Tensor]:
        """Returns weights `(P,)` of several adapters. Reads each recorded adapter once, also if averages contain it.

        Raises:
            TranscriptError: the recording lacks an upload.
        """
        wanted = list(dict.fromkeys(names))
        means = [name for name in wanted if isinstance(name, Mean)]
        sums: list[Tensor | None] = [None] * len(means)
        uses: dict[str, list[int]] = {name: [] for name in wanted if isinstance(name, str)}
        for index, mean in enumerate(means):
            for name in mean.of:
                uses.setdefault(name, []).append(index)
        loaded: dict[str | Mean, Tensor] = dict.fromkeys(wanted, torch.empty(0))
        for name, indices in uses.items():
            weights = self._stored(name)
            if name in loaded:
                loaded[name] = weights
            for index in indices:
                total = sums[index]
                sums[index] = weights.to(torch.float64, copy=True) if total is None else total.add_(weights)
        for mean, total in zip(means, sums, strict=True):
            if total is not None:
                loaded[mean] = (total / len(mean.of)).to(torch.float32)
        return loaded

    def _stored(self, name: str) -> Tensor:
        """Reads the weights of one received adapter."""
        stored = self.weights.get(name)
        if stored is None:
            raise TranscriptError(f"The adapter {name[:12]}… was used but not recorded.", remedy="Record a whole run.")
        return stored.transcript.tensors(stored.event)["weights"]


def read_view(transcript: Transcript, operator: str, tenant: str | None = None) -> View:
    """Reads the calls of one tenant from a recording.

    Raises:
        TranscriptError: the recording has no calls, calls for hidden states of tokens, or several tenants, models or
            runs.
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
    readout = _common_readout(transcript, calls)
    weights = {event.adapters[0]: event for event in events if event.kind == "adapter"}
    specs = [event.spec for event in weights.values()]
    if any(spec != specs[0] for spec in specs) or len({len(event.adapters) for event in calls if event.adapters}) > 1:
        raise TranscriptError(
            f"{transcript.folder} holds adapters of different shapes or numbers, so it contains several runs.",
            remedy="Record every run into a folder of its own (restart the server with another --record).",
        )
    return View(
        operator,
        transcript,
        models.pop(),
        readout,
        specs[0] if specs else None,
        [read_message(event, transcript.tensors(event), operator) for event in calls],
        {name: StoredWeights(transcript, event) for name, event in weights.items()},
    )


def join_views(views: Sequence[View]) -> View:
    """Joins the views of operators that collude: all texts, all adapters, and all shares of each gradient.

    Messages are sorted by the operators' clocks, and keep the name of their operator. Backward calls for the same texts
    under the same adapters carry shares of one gradient, whichever operators received them, unless they belong to
    different steps (`blindtune.audit.messages`).

    Raises:
        TranscriptError: the operators served different runs.
    """
    first = views[0]
    names = " + ".join(view.operator for view in views)
    if any((view.readout, view.spec) != (first.readout, first.spec) for view in views):
        raise TranscriptError(
            f"{names} recorded adapters of different shapes, so they belong to several runs.",
            remedy="Name transcripts of one run with --collude.",
        )
    calls = sorted((call for view in views for call in view.calls), key=lambda call: call.time)
    weights = {name: stored for view in views for name, stored in view.weights.items()}
    return View(names, first.transcript, first.model, first.readout, first.spec, calls, weights)


def _common_readout(transcript: Transcript, calls: Sequence[Event]) -> Readout:
    """Returns the readout of all calls, apart from those for tangents, which have their own.

    Raises:
        TranscriptError: the readouts differ, or have a vector for each token.
    """
    states = [event for event in calls if event.directions is None] or calls
    readout = states[0].readout
    if any(event.readout != readout for event in states):
        raise TranscriptError(
            f"{transcript.folder} holds calls with different readouts, so it contains several runs.",
            remedy="Record every run into a folder of its own (restart the server with another --record).",
        )
    if readout is None or readout.pooling == "none":
        raise TranscriptError(
            f"{transcript.folder} holds calls for hidden states of tokens.",
            remedy="The label audit needs one pooled vector for each text.",
        )
    return readout


def _gradient_channels(shares: Features) -> dict[ChannelId, Features]:
    """Returns the gradients `(m, n, B, d)` by adapter and share, and those of all adapters together."""
    channels: dict[ChannelId, Features] = {}
    for index, gradients in enumerate(shares):
        share = index if len(shares) > 1 else None
        for i, vectors in enumerate(gradients):
            channels[ChannelId(ChannelKind.GRADIENT, adapter=i, share=share)] = vectors
        if len(gradients) > 1:
            joint = ChannelId(ChannelKind.GRADIENT, modifier=JOINT, share=share)
            channels[joint] = np.concatenate(list(gradients), axis=1)
    return channels
