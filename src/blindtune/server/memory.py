"""Frees memory and tries a computation once more when memory runs out, on a GPU or on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from blindtune.errors import OutOfMemory

T = TypeVar("T")
WORDS = ("can't allocate memory", "out of memory", "_ALLOC_FAILED")
"""Words in the messages of errors without a class of their own: of torch's CPU allocator, of CUDA and its libraries."""


def with_room(work: Callable[[], T], make_room: Callable[[], None]) -> T:
    """Runs `work` and returns its result. If memory runs out, calls `make_room` and runs `work` again.

    Raises:
        OutOfMemory: memory runs out again.
    """
    for before_last in (True, False):
        try:
            return work()
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not ran_out(error):
                raise
        # outside the `except` block, so that the error no longer refers to frames with tensors
        if before_last:
            make_room()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise OutOfMemory(
        "The server has not enough memory for this request.",
        remedy="Send a smaller batch, shorter texts or fewer adapters at once.",
    )


def ran_out(error: BaseException) -> bool:
    """Returns whether an error means that memory has run out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in WORDS)
