"""Types of the functions that report the progress of a long audit."""

from __future__ import annotations

from collections.abc import Callable

Advance = Callable[[int], None]
"""Takes the number of parts that were finished since the last call."""
Begin = Callable[[str, int], Advance]
"""Takes the description of a task and its number of parts. Returns a function that reports finished parts."""


def silent(description: str, parts: int) -> Advance:
    """Starts a task whose progress is not reported."""
    return lambda done: None
