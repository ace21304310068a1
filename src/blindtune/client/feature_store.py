"""Keeps the frozen model's hidden states of texts on the client's disk, so that no text is sent twice.

The key of an entry is the SHA-256 of everything that determines the hidden states: the model's weights, the readout,
the codec, the directions of tangents, and the text's tokens. So one store serves all models, readouts and tasks.
Entries hold float32 for the codec fp32, else float16 with a power of two as their scale, and a checksum.
"""

from __future__ import annotations

import hashlib
import math
import os
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from blindtune.errors import CheckpointError
from blindtune.files import PRIVATE
from blindtune.models.tokenizer import TokenRow
from blindtune.wire import Codec, Directions, ModelInfo, Readout, dequantize, quantize

FILE = "features.sqlite"
DEFAULT_MAX_BYTES = 8 * 2**30
_AT_ONCE = 500
"""Number of keys in one query."""


class FeatureStore:
    """Hidden states `(…, k · d)` of texts under the frozen model, in one SQLite file that only its owner can read.

    Args:
        folder: folder of the file; created if it is missing.
        max_bytes: size beyond which the oldest entries are deleted.
    Raises:
        CheckpointError: the folder can't be written, or the file is damaged.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.path = Path(folder).expanduser().absolute() / FILE
        self.max_bytes = max_bytes
        self._lock = Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, PRIVATE)
            os.fchmod(file, PRIVATE)  # a file that was there may be open to others; SQLite's own files get its mode
            os.close(file)
            self._database = sqlite3.connect(self.path, check_same_thread=False, timeout=60.0)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS features (key BLOB PRIMARY KEY, number INTEGER, shape TEXT, "
                "exponent INTEGER, value BLOB, checksum BLOB) WITHOUT ROWID"
            )
            self._database.execute("CREATE INDEX IF NOT EXISTS by_number ON features (number)")
            row = self._database.execute("SELECT MAX(number), SUM(LENGTH(value)) FROM features").fetchone()
            self._next, self._bytes = 1 + (row[0] or 0), int(row[1] or 0)
        except (OSError, sqlite3.Error) as error:
            raise self._damaged(str(error)) from None

    def load(self, source: FeatureSource, rows: Iterable[TokenRow]) -> dict[TokenRow, Tensor]:
        """Returns the stored hidden states of those rows that have any.

        Raises:
            CheckpointError: the file is damaged.
        """
        by_key = {source.key(row): row for row in rows}
        found: dict[TokenRow, Tensor] = {}
        keys = list(by_key)
        try:
            for start in range(0, len(keys), _AT_ONCE):
                part = keys[start : start + _AT_ONCE]
                query = f"SELECT * FROM features WHERE key IN ({','.join('?' * len(part))})"  # noqa: S608 - no values
                with self._lock:
                    entries = self._database.execute(query, part).fetchall()
                for key, _, shape, exponent, value, checksum in entries:
                    if _checksum(key, shape, exponent, value) != checksum:
                        raise self._damaged("an entry doesn't match its checksum")
                    found[by_key[key]] = _decode(shape, exponent, value)
        except sqlite3.Error as error:
            raise self._damaged(str(error)) from None
        return found

    def save(self, source: FeatureSource, rows: Sequence[TokenRow], hidden: Sequence[Tensor]) -> None:
        """Stores the hidden states of rows, as `FeatureSource.rounded` returned them.

        Raises:
            CheckpointError: the file can't be written.
        """
        entries: list[tuple[bytes, int, str, int, bytes, bytes]] = []
        with self._lock:
            for row, states in zip(rows, hidden, strict=True):
                key, (shape, exponent, value) = source.key(row), source.encode(states)
                entries.append((key, self._next, shape, exponent, value, _checksum(key, shape, exponent, value)))
                self._next += 1
                self._bytes += len(value)
            try:
                with self._database:
                    self._database.executemany("INSERT OR REPLACE INTO features VALUES (?, ?, ?, ?, ?, ?)", entries)
                    self._delete_oldest()
            except sqlite3.Error as error:
                raise self._damaged(str(error)) from None

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    def _delete_oldest(self) -> None:
        while self._bytes > self.max_bytes:
            oldest = self._database.execute(
                "SELECT key, LENGTH(value) FROM features ORDER BY number LIMIT ?", (_AT_ONCE,)
            ).fetchall()
            if not oldest:
                self._bytes = 0
                return
            for key, size in oldest:
                self._database.execute("DELETE FROM features WHERE key = ?", (key,))
                self._bytes -= size
                if self._bytes <= self.max_bytes:
                    return

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"The feature store {self.path} can't be used: {reason}.",
            remedy="Delete the file (texts are sent again), or name another folder.",
        )


class FeatureSource:
    """Everything that determines frozen hidden states apart from the text: the model's weights, readout, and codec.

    With directions it determines tangents `(count, k · d)`.
    """

    def __init__(self, info: ModelInfo, readout: Readout, codec: Codec, directions: Directions | None = None) -> None:
        described = f"1 {info.fingerprint} {info.dtype} {readout.model_dump_json()} {codec}"
        if directions is not None:
            described += f" {directions.model_dump_json()}"
        self._digest = hashlib.sha256(described.encode())
        self.codec: Codec = codec
        self.name = self._digest.hexdigest()

    def key(self, row: TokenRow) -> bytes:
        """Returns the key of a text's entry."""
        digest = self._digest.copy()
        digest.update(repr((tuple(row.ids), tuple(row.types))).encode())
        return digest.digest()

    def rounded(self, states: Tensor) -> Tensor:
        """Returns hidden states as they will be read from the store, so that all runs use the same numbers."""
        return states if self.codec == "fp32" else _decode(*self.encode(states))

    def encode(self, states: Tensor) -> tuple[str, int, bytes]:
        """Returns the shape, the power of two and the bytes of an entry."""
        shape = ",".join(map(str, states.shape))
        if self.codec == "fp32":
            return shape, 0, states.float().contiguous().numpy().astype("<f4").tobytes()
        sent = quantize("states", states.reshape(1, -1), "fp16")
        return shape, int(sent["states.exponent"]), sent["states.values"].numpy().astype("<f2").tobytes()


def _decode(shape: str, exponent: int, value: bytes) -> Tensor:
    sizes = [int(size) for size in shape.split(",")]
    count = math.prod(sizes)
    if len(value) == 4 * count:
        return torch.from_numpy(np.frombuffer(value, dtype="<f4").copy()).reshape(sizes)
    values = torch.from_numpy(np.frombuffer(value, dtype="<f2").copy()).reshape(1, count)
    sent = {"states.values": values, "states.exponent": torch.tensor([exponent], dtype=torch.int32)}
    return dequantize("states", sent, "fp16", count).reshape(sizes)


def _checksum(key: bytes, shape: str, exponent: int, value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=16, key=key, person=f"{shape};{exponent}".encode()[-16:]).digest()
