"""What happens when memory runs out, on a GPU or here: caches make room, and the work is tried once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from blindtune.errors import OutOfMemory

T = TypeVar("T")
WORDS = ("can't allocate memory", "out of memory", "_ALLOC_FAILED")
"""How torch's CPU allocator, CUDA and its libraries say it, whose errors have no class of their own."""


def with_room(work: Callable[[], T], make_room: Callable[[], None]) -> T:
    """What `work` gives; after `make_room`, if memory has run out the first time.

    Raises:
        OutOfMemory: it doesn't fit even then.
    """
    for before_last in (True, False):
        try:
            return work()
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not ran_out(error):
                raise
        # the error is gone, and with it the frames that held tensors
        if before_last:
            make_room()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise OutOfMemory(
        "The server has not enough memory for this request.",
        remedy="Send a smaller batch, shorter texts or fewer adapters at once.",
    )


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory has run out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in WORDS)
