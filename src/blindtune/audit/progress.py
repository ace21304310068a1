"""How a long audit reports what it does."""

from __future__ import annotations

from collections.abc import Callable

Advance = Callable[[int], None]
"""Called with the number of parts that were done."""
Begin = Callable[[str, int], Advance]
"""Begins a task with a description and so many parts, and returns what reports parts that were done."""


def silent(description: str, parts: int) -> Advance:
    """Reports nothing."""
    return lambda done: None
