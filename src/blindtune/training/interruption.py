"""Handles Ctrl-C: a run stops after the current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """The user interrupted the run with Ctrl-C. The checkpoint has the last complete step."""


@contextmanager
def stop_request() -> Generator[Callable[[], bool]]:
    """Context manager that turns the first Ctrl-C into a request to stop after the current step.

    A second Ctrl-C raises `KeyboardInterrupt` at once.

    Yields:
        A function that returns whether Ctrl-C was pressed. Outside the main thread, where Python allows no signal
        handlers, it always returns false.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    requested = False

    def request_stop(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        requested = True
        signal.signal(number, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, request_stop)
    try:
        yield lambda: requested
    finally:
        signal.signal(signal.SIGINT, previous)
