"""`blindtune` in real processes that begin with Python's libraries in memory: to import them takes longer than a test.

A fork server (of `multiprocessing`) imports them once for each worker of pytest, and forks before anything has run.
Tests of how a command starts and ends as a user starts it use `subprocess` (`test_demo.py`, `cli/test_commands.py`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["blindtune.models", "blindtune.server", "transformers.models.bert.modeling_bert", "transformers.models.llama"]
)


@dataclass
class Command:
    """A `blindtune` command in a process of its own."""

    process: ForkServerProcess
    output: Path
    errors: Path

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def first_line(self, beginning: str) -> str:
        """The first line of its output that begins so, as soon as it is there."""
        while True:
            alive = self.alive  # looked at before the file, so that last words are read
            for line in self.output.read_text().splitlines(keepends=True):
                if line.startswith(beginning) and line.endswith("\n"):
                    return line
            if not alive:
                raise AssertionError(f"It ended before it said {beginning!r}:\n{self.errors.read_text()}")
            time.sleep(0.02)

    def send_signal(self, number: int) -> None:
        if self.alive:
            assert self.process.pid is not None
            os.kill(self.process.pid, number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends it and returns its exit status; may be called again."""
        self.send_signal(number)
        self.process.join(timeout=60)
        assert self.process.exitcode is not None, "It doesn't end."
        return self.process.exitcode


def run(*arguments: object, check: bool = True) -> CompletedProcess[str]:
    """`blindtune` with these arguments, to its end; a failure fails the test, unless `check` is off."""
    with TemporaryDirectory() as folder:
        command = start([*map(str, arguments)], Path(folder), columns=160)
        command.process.join()
        status, said = command.process.exitcode, [path.read_text() for path in (command.output, command.errors)]
    assert status is not None
    assert not check or status == 0, "".join(said)
    return CompletedProcess(arguments, status, *said)


def start(arguments: list[str], folder: Path, columns: int = 200) -> Command:
    """Starts `blindtune` with these arguments; what it prints goes to files in the folder."""
    output, errors = folder / "output.log", folder / "errors.log"
    for path in (output, errors):
        path.touch()
    environment = {**os.environ, "COLUMNS": str(columns)}
    process = CONTEXT.Process(target=_run, args=(arguments, output, errors, environment), daemon=True)
    process.start()
    return Command(process, output, errors)


def _run(arguments: list[str], output: Path, errors: Path, environment: dict[str, str]) -> None:
    for path, stream in ((output, sys.stdout), (errors, sys.stderr)):
        descriptor = os.open(path, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
        stream.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue] - a text stream
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["blindtune", *arguments]

    from blindtune.cli import main

    main()
