"""Shows progress on the console: bars for tasks, and a bar with a status line for training."""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from blindtune import labels, texts
from blindtune.client import Backbone
from blindtune.client.backbone import PAIR_COPIES
from blindtune.data import Examples
from blindtune.models.tokenizer import Text
from blindtune.training import Callback

if TYPE_CHECKING:
    from blindtune.audit.progress import Begin

RECENT = 20
"""Number of steps over which the displayed numbers are averaged."""


class Bars(Progress):
    """Progress bars. If the console isn't a terminal, a line is printed every few seconds instead."""

    EVERY = 10.0
    """Seconds between such lines."""
    _printed = 0.0

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        if not self.console.is_terminal and time.monotonic() - self._printed > self.EVERY:
            self._printed = time.monotonic()
            task = self.tasks[self.task_ids.index(task_id)]
            status = task.fields.get("status", "")
            total = "" if task.total is None else f"/{task.total:.0f}"
            self.console.print(f"{task.description} {task.completed:.0f}{total} {status}")


STEP_COLUMNS = (
    TextColumn("[bold]{task.description}"),
    BarColumn(bar_width=20),
    MofNCompleteColumn(),
    TextColumn("{task.fields[status]}"),
    TimeElapsedColumn(),
    TextColumn("ETA"),
    TimeRemainingColumn(),
)
TASK_COLUMNS: tuple[ProgressColumn, ...] = (
    TextColumn("[bold]{task.description}"),
    BarColumn(bar_width=20),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
)


class StepBar(Callback):
    """A progress bar over training steps, with a status line such as loss, steps per second, and bytes.

    Args:
        status: function that returns the status line for all steps so far.
    """

    def __init__(self, console: Console, title: str, status: Callable[[list[Any]], str]) -> None:
        self._bars = Bars(*STEP_COLUMNS, console=console)
        self._title, self._status = title, status
        self._done: list[Any] = []
        self._task = TaskID(0)

    def on_train_begin(self, done: int, steps: int) -> None:
        self._bars.start()
        self._task = self._bars.add_task(self._title, total=steps, completed=done, status="")

    def on_step_end(self, step: Any) -> None:
        self._done.append(step)
        self._bars.update(self._task, status=self._status(self._done))
        self._bars.advance(self._task)

    def on_train_end(self) -> None:
        self._bars.stop()


@contextmanager
def inference_progress(backbone: Backbone, console: Console, title: str, total: int) -> Generator[None]:
    """Shows a progress bar for the texts that `backbone` runs without gradient within this context."""
    with Bars(*TASK_COLUMNS, console=console) as progress:
        task = progress.add_task(title, total=total)
        backbone.on_infer = lambda count: progress.advance(task, count)
        try:
            yield
        finally:
            backbone.on_infer = None


@contextmanager
def counting(console: Console, title: str) -> "Generator[Callable[[int, int], None]]":
    """Shows a progress bar within this context, which yields a callback for the number done and the number of all."""
    with Bars(*TASK_COLUMNS, console=console) as progress:
        task = progress.add_task(title, total=None)

        def count(done: int, total: int) -> None:
            progress.update(task, total=total)
            progress.advance(task)

        yield count


def fit_frozen(private: labels.PrivateModel, train: Examples, held_out: Sequence[Text], console: Console) -> None:
    """Fits the head of a method that isn't trained in steps, with progress bars.

    All texts are sent before any label is used, the held-out ones too.
    """
    backbone, method = private.backbone, private.method
    everything = [*train.texts, *held_out]
    copies = PAIR_COPIES[backbone.pairs] + method.requests_per_text - 1
    with inference_progress(backbone, console, "frozen features", copies * len(everything)):
        private.fetch(everything)
    with counting(console, "fitting") as count:
        method.on_progress = count
        private.prepare(train.texts, train.labels or [])


@contextmanager
def audit_progress(console: Console) -> "Generator[Begin]":
    """Shows a progress bar for each task of an audit within this context."""
    with Bars(*TASK_COLUMNS, console=console) as progress:

        def begin(description: str, parts: int) -> Callable[[int], None]:
            task = progress.add_task(description, total=parts)
            return lambda done: progress.advance(task, done)

        yield begin


def labels_status(steps: list[labels.Step]) -> str:
    """Returns a line with loss, accuracy, steps per second, bytes per step, and μ with ε and δ."""
    recent = steps[-RECENT:]
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


def texts_status(steps: list[texts.Step]) -> str:
    """Returns a line with losses, steps per second, and bytes per step."""
    recent = steps[-RECENT:]
    means = {name: sum(step.losses[name] for step in recent) / len(recent) for name in recent[-1].losses}
    losses = "  ".join(f"{'loss' if name == 'task' else name} {value:.3f}" for name, value in means.items())
    rate = len(recent) / sum(step.seconds for step in recent)
    return f"{losses}  {rate:.2f} steps/s  {human_bytes(sum(recent[-1].traffic.values()))}/step"


def human_bytes(count: float) -> str:
    """Returns a number of bytes as text, e.g. `1.5 kB` for 1536."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
