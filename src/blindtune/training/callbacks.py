"""Callbacks of the training loop, with the method names of transformers' callbacks."""

from __future__ import annotations

from typing import Any, Protocol


class Progress(Protocol):
    """The metrics of one step: its number, its losses by name, and its duration in seconds."""

    @property
    def step(self) -> int: ...
    @property
    def losses(self) -> dict[str, float]: ...
    @property
    def seconds(self) -> float: ...


class Callback:
    """Base class of callbacks. Its methods do nothing; override those that you need."""

    def on_train_begin(self, done: int, steps: int) -> None:
        """Called before the first of the remaining steps, with the number of complete steps and of all steps."""

    def on_step_end(self, step: Any) -> None:
        """Called after each step, with its metrics."""

    def on_train_end(self) -> None:
        """Called when the run ends, also by an error or an interruption."""
