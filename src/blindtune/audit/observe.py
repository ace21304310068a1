"""What a server can compute from what it saw: activations and shifts of every text under every adapter it received.

The server keeps all texts and all adapters θ_t. At any later moment it can run each text that it has seen through
the adapters of any step, so it isn't bound to the (x, θ) pairs that were sent together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blindtune.errors import TranscriptError
from blindtune.models import FrozenBackbone, LoraLayout, Tokens
from blindtune.wire import Event, LoraSpec, Pooling, Transcript

Row = tuple[int, ...]
"""Token ids of one text, without padding."""
Features = NDArray[np.float32]

Memory = dict[tuple[str, bytes], NDArray[np.float64]]
"""`(attack, digest of features and labels) -> scores`: operators that see the same adapters see the same vectors."""

TOKENS_IN_A_PASS = 16_384


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


@dataclass
class View:
    """One server's knowledge, in its own order: texts, checkpoints, and the vectors that it was sent or sent."""

    operator: str
    transcript: Transcript
    model: str
    pooling: Pooling
    spec: LoraSpec | None
    types: dict[Row, Row] = field(default_factory=dict[Row, Row])
    """Texts in order of first sight, with their token types."""
    first_seen: dict[Row, int] = field(default_factory=dict[Row, int])
    """Text -> first step at which the server had it."""
    checkpoints: list[Checkpoint] = field(default_factory=list[Checkpoint])
    weights: dict[str, Event] = field(default_factory=dict[str, Event])
    sightings: list[Sighting] = field(default_factory=list[Sighting])
    messages: int = 0

    def rows_until(self, step: int) -> list[Row]:
        """Texts that the server had seen when it received the adapters of `step`."""
        return [row for row, first in self.first_seen.items() if first <= step]


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
    view = View(operator, transcript, models.pop(), _pooling(poolings.pop()), specs[0] if specs else None)
    view.weights = weights
    view.messages = len(events)
    seen: dict[tuple[str, ...], int] = {}
    step = 0
    for event in calls:
        tensors = transcript.tensors(event)
        rows = _rows(tensors)
        adapters = tuple(event.adapters)
        if adapters:
            if adapters not in seen:
                seen[adapters] = len(view.checkpoints)
                view.checkpoints.append(Checkpoint(adapters, len(view.checkpoints)))
            step = seen[adapters]
        for row, row_types in rows:
            view.types.setdefault(row, row_types)
            view.first_seen.setdefault(row, step)
        channels = _literal_channels(tensors)
        if adapters and channels:
            view.sightings.append(Sighting(step, tuple(row for row, _ in rows), channels))
    return view


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


def _literal_channels(tensors: dict[str, Tensor]) -> dict[str, Features]:
    """`sent/i` from hidden states `(n, B, d)`, `gradient/i` from cotangents `(m, n, B, d)`, and their joints."""
    channels: dict[str, Features] = {}
    if "hidden" in tensors:
        hidden = tensors["hidden"].float().numpy()
        channels |= {f"sent activation {i}": vectors for i, vectors in enumerate(hidden)}
    if "cotangents" in tensors:
        cotangents = tensors["cotangents"].float().numpy()
        for j, share in enumerate(cotangents):
            mark = f".{j}" if len(cotangents) > 1 else ""
            channels |= {f"gradient {i}{mark}": vectors for i, vectors in enumerate(share)}
            if len(share) > 1:
                channels[f"gradients joint{mark}"] = np.concatenate(list(share), axis=1)
    return channels


class Recomputation:
    """Hidden states of texts under checkpoints, each computed once and kept for all views that share it.

    `scores` remembers in the same way what attacks made of them.
    """

    def __init__(self, backbone: FrozenBackbone, on_texts: Callable[[int], None] | None = None) -> None:
        self.backbone, self.on_texts = backbone, on_texts
        self.scores = Memory()
        self._known: dict[tuple[str, ...], dict[Row, Features]] = {}

    def hidden(self, view: View, checkpoint: tuple[str, ...], rows: Sequence[Row]) -> Features:
        """h(x, θ_i): `(n, N, d)`; the empty checkpoint is the frozen model, n = 1."""
        self.ensure(view, [checkpoint], rows)
        known = self._known[checkpoint]
        return np.stack([known[row] for row in rows], axis=1)

    def ensure(self, view: View, checkpoints: Sequence[tuple[str, ...]], rows: Sequence[Row]) -> None:
        """Runs all texts through all checkpoints in shared passes: the layers below the adapters run once."""
        groups: dict[int, list[tuple[str, ...]]] = {}
        for checkpoint in dict.fromkeys(checkpoints):
            groups.setdefault(len(checkpoint), []).append(checkpoint)
        for n, group in groups.items():
            wanted = [row for row in dict.fromkeys(rows) if any(row not in self._known.get(c, {}) for c in group)]
            if not wanted:
                continue
            for c in group:
                self._known.setdefault(c, {})
            layout, weights = self._stack(view, group) if n else (None, None)
            for part in _portions(sorted(wanted, key=len), max(1, n * len(group))):
                with torch.no_grad():
                    hidden = self.backbone.forward(pad_rows(view, part, self.backbone), view.pooling, layout, weights)
                split = hidden.cpu().numpy().reshape(len(group), max(1, n), len(part), -1)
                for c, vectors in zip(group, split, strict=True):
                    self._known[c].update({row: vectors[:, index] for index, row in enumerate(part)})
                if self.on_texts is not None:
                    self.on_texts(len(part))

    def _stack(self, view: View, group: Sequence[tuple[str, ...]]) -> tuple[LoraLayout, Tensor]:
        if view.spec is None:
            raise TranscriptError(f"{view.transcript.folder} holds no adapters.", remedy="Record a whole run.")
        vectors: dict[str, Tensor] = {}
        for name in {name for checkpoint in group for name in checkpoint}:
            event = view.weights.get(name)
            if event is None:
                raise TranscriptError(
                    f"The adapter {name[:12]}… was used but not recorded.", remedy="Record a whole run."
                )
            vectors[name] = view.transcript.tensors(event)["weights"]
        layout = LoraLayout(view.spec, self.backbone.lora.shapes)
        return layout, torch.stack([vectors[name] for checkpoint in group for name in checkpoint])


def _portions(rows: list[Row], copies: int) -> Iterator[list[Row]]:
    """Consecutive rows whose padded size, times the adapters, stays below `TOKENS_IN_A_PASS`."""
    portion: list[Row] = []
    for row in rows:
        if portion and (len(portion) + 1) * len(row) * copies > TOKENS_IN_A_PASS:
            yield portion
            portion = []
        portion.append(row)
    if portion:
        yield portion


def pad_rows(view: View, rows: Sequence[Row], backbone: FrozenBackbone) -> Tokens:
    """A right-padded batch of texts that this server saw."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), backbone.pad_token_id, dtype=torch.int32)
    types = torch.zeros((len(rows), length), dtype=torch.uint8)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        types[index, : len(row)] = torch.tensor(view.types[row])
    return Tokens(ids, torch.tensor([len(row) for row in rows], dtype=torch.int32), types)
