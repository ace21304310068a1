"""Keeps the frozen model's hidden states and tangents of texts, so that no text is sent twice.

They are kept in memory, beyond a limit in a temporary file, and, if the user wants, in the client's store. What is kept
never has to be asked for again: a server that sees a text twice could learn when and in which order the client uses it.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from tempfile import mkdtemp
from threading import Lock
from weakref import finalize

from torch import Tensor

from blindtune.client.feature_store import FeatureSource, FeatureStore
from blindtune.models.tokenizer import TokenRow

MEMORY = 2 * 2**30
"""Size in bytes of the states that are kept in memory by default."""
_AT_ONCE = 500
"""Number of rows that are read from a file at once."""
_Key = tuple[str, TokenRow]


class StateCache:
    """States of token rows from several sources. Nothing is forgotten until it is closed.

    Args:
        store: the client's store; None for none.
        memory: size in bytes beyond which the oldest states are moved to a temporary file.
    """

    def __init__(self, store: FeatureStore | None, memory: int) -> None:
        self.store, self.memory = store, memory
        self._known: OrderedDict[_Key, Tensor] = OrderedDict()
        self._bytes = 0
        self._moved: set[_Key] = set()
        """Keys of the states in the temporary file."""
        self._sources: dict[str, FeatureSource] = {}
        self._file: FeatureStore | None = None
        self._remove: Callable[[], object] | None = None
        self._lock = Lock()

    def missing(self, source: FeatureSource, rows: Sequence[TokenRow]) -> list[TokenRow]:
        """Returns the distinct rows whose states aren't kept, and loads those that are in the store alone.

        Raises:
            CheckpointError: the store is damaged.
        """
        with self._lock:
            unknown = list({row for row in rows if not self._holds((source.name, row))})
        if self.store is None:
            return unknown
        missing: list[TokenRow] = []
        for start in range(0, len(unknown), _AT_ONCE):
            part = unknown[start : start + _AT_ONCE]
            loaded = self.store.load(source, part)
            self._keep(source, list(loaded), list(loaded.values()))
            missing += [row for row in part if row not in loaded]
        return missing

    def add(self, source: FeatureSource, rows: Sequence[TokenRow], fetched: Sequence[Tensor]) -> None:
        """Keeps states that an operator sent, and writes them to the store. Several threads may call it."""
        states = [source.rounded(each.clone()) for each in fetched]
        self._keep(source, rows, states)  # first, so that a full disk doesn't make anyone ask again
        if self.store is not None:
            self.store.save(source, rows, states)

    def take(self, source: FeatureSource, rows: Sequence[TokenRow]) -> list[Tensor]:
        """Returns the states of rows, none of which are missing."""
        with self._lock:
            found = {row: self._known[source.name, row] for row in rows if (source.name, row) in self._known}
            moved = list({row for row in rows if row not in found})
            for start in range(0, len(moved), _AT_ONCE):
                found |= self._temporary().load(source, moved[start : start + _AT_ONCE])
        return [found[row] for row in rows]

    def close(self) -> None:
        """Deletes the temporary file and closes the store."""
        if self._file is not None and self._remove is not None:
            self._file.close()
            self._remove()
        if self.store is not None:
            self.store.close()

    def _holds(self, key: _Key) -> bool:
        return key in self._known or key in self._moved

    def _keep(self, source: FeatureSource, rows: Sequence[TokenRow], states: Sequence[Tensor]) -> None:
        with self._lock:
            self._sources[source.name] = source
            for row, state in zip(rows, states, strict=True):
                key = (source.name, row)
                if not self._holds(key):
                    self._known[key] = state
                    self._bytes += state.nbytes
            self._move_oldest()

    def _move_oldest(self) -> None:
        """Moves the oldest states to the temporary file, if there are too many in memory."""
        moved: dict[str, list[tuple[TokenRow, Tensor]]] = {}
        excess = self._bytes - self.memory
        for (name, row), state in self._known.items():
            if excess <= 0:
                break
            excess -= state.nbytes
            moved.setdefault(name, []).append((row, state))
        for name, pairs in moved.items():
            self._temporary().save(self._sources[name], [row for row, _ in pairs], [state for _, state in pairs])
            for row, state in pairs:  # only now, so that nothing is lost if the disk is full
                self._moved.add((name, row))
                del self._known[name, row]
                self._bytes -= state.nbytes

    def _temporary(self) -> FeatureStore:
        """Returns the temporary file, which is made when it is needed."""
        if self._file is None:
            folder = mkdtemp(prefix="blindtune-states-")  # only its owner can read it
            self._remove = finalize(self, _remove, folder, os.getpid())
            self._file = FeatureStore(folder, max_bytes=sys.maxsize)
        return self._file


def _remove(folder: str, process: int) -> None:
    """Removes a temporary folder, unless this is a forked copy of the process that made it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
