"""A cache with a limit in bytes. When it is full, it drops the least recently used items."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ByteLRU(Generic[K, V]):
    """Maps keys to values whose sizes add up to at most `capacity` bytes. Safe to use from several threads.

    Args:
        capacity: largest total size of the values in bytes.
        on_change: callback invoked with the total size in bytes after each change.
    """

    def __init__(self, capacity: int, on_change: Callable[[int], None] | None = None) -> None:
        self._capacity, self._on_change = capacity, on_change
        self._items: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """Total size of all values in bytes."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._items)

    def put(self, key: K, value: V, nbytes: int) -> bool:
        """Stores a value of `nbytes` bytes, and drops the least recently used values until the rest fits.

        Returns:
            False if the value is larger than the whole cache and was not stored.
        """
        with self._lock:
            self._remove(key)
            fits = nbytes <= self._capacity
            if fits:
                self._items[key] = (value, nbytes)
                self._bytes += nbytes
                while self._bytes > self._capacity:
                    self._remove(next(iter(self._items)))
            self._report()
            return fits

    def get(self, key: K) -> V | None:
        """Returns the value, which then counts as used; None if it isn't in the cache."""
        with self._lock:
            item = self._items.get(key)
            if item is None:
                return None
            self._items.move_to_end(key)
            return item[0]

    def pop(self, key: K) -> V | None:
        """Removes and returns the value; None if it isn't in the cache."""
        with self._lock:
            item = self._remove(key)
            self._report()
            return item[0] if item else None

    def clear(self) -> None:
        """Drops all values."""
        with self._lock:
            self._items.clear()
            self._bytes = 0
            self._report()

    def _remove(self, key: K) -> tuple[V, int] | None:
        item = self._items.pop(key, None)
        if item is not None:
            self._bytes -= item[1]
        return item

    def _report(self) -> None:
        if self._on_change is not None:
            self._on_change(self._bytes)
