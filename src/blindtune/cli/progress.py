"""The training progress line, and Ctrl-C that ends a run between two steps."""

import re
import signal
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from blindtune.client import Backbone
from blindtune.training import Step, Trainer
from blindtune.training.guarded import GuardedStep, GuardedTrainer

S = TypeVar("S")
PROCESS = Path("/proc/self")


class Bars(Progress):
    """Progress bars; where there is no terminal to draw them on, a line every few seconds."""

    EVERY = 10.0
    _spoken = 0.0

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        if not self.console.is_terminal and time.monotonic() - self._spoken > self.EVERY:
            self._spoken = time.monotonic()
            task = self.tasks[self.task_ids.index(task_id)]
            status = task.fields.get("status", "")
            self.console.print(f"{task.description} {task.completed:.0f}/{task.total:.0f} {status}")


STEP_COLUMNS = (
    TextColumn("[bold]{task.description}"),
    BarColumn(bar_width=20),
    MofNCompleteColumn(),
    TextColumn("{task.fields[status]}"),
    TimeElapsedColumn(),
    TextColumn("ETA"),
    TimeRemainingColumn(),
)


class Interrupted(Exception):
    """The user asked to stop; the last complete step is what counts."""


def run_steps(
    trainer: Trainer, console: Console, title: str, *, on_step: Callable[[Step], None] | None = None
) -> list[Step]:
    """Runs all remaining steps under a progress bar: loss, steps/s, bytes, μ with ε and δ, ETA.

    Raises:
        Interrupted: after the step that was under way at the first Ctrl-C.
    """
    return _run_steps(trainer, console, title, _status, on_step)


def run_guarded_steps(trainer: GuardedTrainer, console: Console, title: str) -> list[GuardedStep]:
    """As `run_steps`, for split models. `peak_memory` is that of the steps then."""
    reset_peak_memory()
    return _run_steps(trainer, console, title, _guarded_status, None)


def _run_steps(
    trainer: Any, console: Console, title: str, status: Callable[[list[S]], str], on_step: Callable[[S], None] | None
) -> list[S]:
    done: list[S] = []
    with Bars(*STEP_COLUMNS, console=console) as progress, _stop_request() as stopped:
        task = progress.add_task(title, total=trainer.config.steps, completed=trainer.done, status="")
        for step in trainer.steps():
            done.append(step)
            progress.update(task, status=status(done))
            progress.advance(task)
            if on_step is not None:
                on_step(step)
            if stopped():
                raise Interrupted
    return done


@contextmanager
def inference_progress(backbone: Backbone, console: Console, title: str, total: int) -> Generator[None]:
    """A progress bar for the texts that `backbone` runs without gradient meanwhile."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=console) as progress:
        task = progress.add_task(title, total=total)
        backbone.on_infer = lambda count: progress.advance(task, count)
        try:
            yield
        finally:
            backbone.on_infer = None


def _status(steps: list[Step]) -> str:
    recent = steps[-20:]
    loss = sum(step.losses["task"] for step in recent) / len(recent)
    rate = len(recent) / sum(step.seconds for step in recent)
    traffic = recent[-1].bytes_sent + recent[-1].bytes_received
    accuracy = sum(step.accuracy for step in recent) / len(recent)
    shown = f"loss {loss:.3f}  acc {accuracy:.2f}  {rate:.2f} steps/s  {human_bytes(traffic)}/step"
    report = recent[-1].report
    prefix = "" if "mu" in report else "gradient_channel_"
    if prefix + "mu" not in report:
        return shown
    mu, epsilon, delta = (report[prefix + name] for name in ("mu", "epsilon", "delta"))
    of = f" of {report['mu_budget']:g}" if "mu_budget" in report else " (shares)"
    return f"{shown}  μ {mu:.3f}{of} (ε {epsilon:.3f} at δ {delta:g})"


def _guarded_status(steps: list[GuardedStep]) -> str:
    recent = steps[-20:]
    means = {name: sum(step.losses[name] for step in recent) / len(recent) for name in recent[-1].losses}
    losses = "  ".join(f"{'loss' if name == 'task' else name} {value:.3f}" for name, value in means.items())
    rate = len(recent) / sum(step.seconds for step in recent)
    return f"{losses}  {rate:.2f} steps/s  {human_bytes(sum(recent[-1].traffic.values()))}/step"


def human_bytes(count: float) -> str:
    """1536 -> 1.5 kB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def reset_peak_memory() -> bool:
    """Makes `peak_memory` forget what was freed before; False where that can't be done (Linux alone can)."""
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """Most bytes of memory that this process had (Python and its libraries included) since `reset_peak_memory`.

    Where that can't be done, since it began.
    """
    try:
        status = (PROCESS / "status").read_text()
    except OSError:
        status = ""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    if found:
        return 1024 * int(found[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_device_memory(device: torch.device) -> int:
    """Most bytes that tensors had on a GPU since this process began; 0 for the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


@contextmanager
def _stop_request() -> Generator[Callable[[], bool]]:
    """First Ctrl-C: asks to stop after the step. Second: interrupts at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
