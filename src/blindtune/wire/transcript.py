"""Transcripts: recordings of all messages that one server received and sent. A transcript is the audit's only input.

A transcript is a folder with `index.jsonl` (the first line describes the recording, every further line one event) and
`shard-NNNNN.safetensors` files. The tensor `name` of event 17 is stored under the key `17/name`.

| event kind | tensors |
|---|---|
| adapter | `weights [P]` |
| forward | `input_ids [B, L]`, `lengths [B]`, (`token_type_ids [B, L]`,) `hidden` (or tangents) as sent, if it was |
| backward | `input_ids`, `lengths`, (`token_type_ids`,) `cotangents [m, n, B, d]` |
| trunk-forward | `lengths [B]`, `hidden` as received, `answer` as sent; packed, in the event's codecs |
| plugin | tuned weights by name, as received |
| score | `input_ids`, `lengths`, `starts [B]` |
| generate | `input_ids`, `lengths` |
| trunk-backward | `lengths [B]`, `cotangents` (and `hidden` if sent again) as received, `answer` (gradients) as sent |
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Literal

from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from blindtune.errors import TranscriptError
from blindtune.wire.schema import Codec, Directions, LoraSpec, Pooling, Projection, Readout

INDEX = "index.jsonl"
FORMAT = 1


class RecordedModel(BaseModel):
    """The source of a hosted pretrained model, and its fingerprint, with which an audit checks that it has the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str
    dtype: str
    fingerprint: str
    bottom: int | None = None
    """Number of blocks in a cut model's bottom."""
    top: int | None = None
    """Number of blocks in a cut model's top."""


class Recording(BaseModel):
    """The first line of the index: it describes the recording."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int = FORMAT
    operator_id: str
    models: dict[str, RecordedModel]


class Event(BaseModel):
    """One recorded message."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    event: int
    """Index of the event in the transcript, from 0."""
    time: float
    """Unix time in seconds."""
    tenant: str
    kind: Literal["adapter", "forward", "backward", "trunk-forward", "trunk-backward", "plugin", "score", "generate"]
    model: str
    adapters: list[str] = []
    """SHA-256 of each adapter; for the kinds `adapter` and `plugin`, of the upload alone."""
    spec: LoraSpec | None = None
    pooling: Pooling | None = None
    layers: tuple[int, ...] = ()
    projection: Projection | None = None
    seed: int | None = None
    directions: Directions | None = None
    """Directions of a forward call for tangents."""
    up: Codec | None = None
    down: Codec | None = None
    forward: str | None = None
    """In messages to a trunk: SHA-256 of the forward request's body, which a backward request names."""
    tensors: list[str] = []
    """Names of the event's tensors."""
    shard: str = ""
    """Name of the file that holds them."""

    @property
    def readout(self) -> Readout | None:
        """The readout of a pass; None for other messages."""
        if self.pooling is None:
            return None
        return Readout(pooling=self.pooling, layers=self.layers, projection=self.projection)


class TranscriptWriter:
    """Appends events to a transcript's folder.

    Args:
        flush_bytes: number of bytes of tensors after which pending events are written. If the process is killed, the
            pending events are lost.
    """

    def __init__(self, folder: Path, recording: Recording, *, flush_bytes: int = 4 * 2**20) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._flush_bytes, self._lock = folder, flush_bytes, Lock()
        self._pending: list[Event] = []
        self._tensors: dict[str, Tensor] = {}
        self._events = self._shards = self._bytes = 0
        if (folder / INDEX).exists():  # a restarted server appends to the transcript of the one before
            earlier = Transcript(folder)
            if earlier.recording.models != recording.models:
                raise TranscriptError(f"{folder} records other models.", remedy="Record into an empty folder.")
            self._events = len(earlier.events)
            self._shards = len({event.shard for event in earlier.events})
            os.truncate(folder / INDEX, len(_complete_lines(folder / INDEX)))
        else:
            partial = folder / (INDEX + ".part")
            partial.write_text(recording.model_dump_json() + "\n", encoding="utf-8")
            os.replace(partial, folder / INDEX)

    def add(self, event: Event, tensors: Mapping[str, Tensor]) -> None:
        """Appends an event. Its index, time, tensor names and shard are filled in here."""
        with self._lock:
            numbered = event.model_copy(update={"event": self._events, "time": time.time(), "tensors": sorted(tensors)})
            self._events += 1
            self._pending.append(numbered)
            for name, tensor in tensors.items():
                self._tensors[f"{numbered.event}/{name}"] = tensor.detach().cpu().clone()
                self._bytes += tensor.nbytes
            if self._bytes >= self._flush_bytes:
                self._flush()

    def close(self) -> None:
        """Writes all pending events to disk."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        """Writes the pending events: first the file with their tensors, then their lines in the index."""
        if not self._pending:
            return
        shard = f"shard-{self._shards:05d}.safetensors"
        partial = self._folder / (shard + ".part")
        save_file(self._tensors, partial)
        os.replace(partial, self._folder / shard)
        with (self._folder / INDEX).open("a", encoding="utf-8") as index:
            for event in self._pending:
                index.write(event.model_copy(update={"shard": shard}).model_dump_json() + "\n")
        self._pending, self._tensors, self._bytes = [], {}, 0
        self._shards += 1


class Transcript:
    """A transcript that is read from a folder. Tensors are read on demand.

    Raises:
        TranscriptError: the folder has no index, or one that isn't a transcript's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX
        if not index.is_file():
            raise TranscriptError(
                f"{folder} holds no {INDEX}.", remedy="Name the folder that `blindtune serve --record` wrote."
            )
        try:
            lines = _complete_lines(index).decode().removesuffix("\n").split("\n")
            self.recording = Recording.model_validate_json(lines[0])
            self.events = [Event.model_validate_json(line) for line in lines[1:]]
        except ValueError as error:
            raise TranscriptError(f"{index} is not a transcript: {error}.", remedy="Record the run again.") from None

    def tensors(self, event: Event) -> dict[str, Tensor]:
        """Returns all tensors of one event by name."""
        with safe_open(self.folder / event.shard, framework="pt") as shard:
            return {name: shard.get_tensor(f"{event.event}/{name}") for name in event.tensors}


def _complete_lines(index: Path) -> bytes:
    """Returns the content of the index without an incomplete last line, which a crash may leave."""
    content = index.read_bytes()
    return content[: content.rfind(b"\n") + 1]
