"""Servers as child processes of a command: started, awaited, and ended by it."""

import os
import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from blindtune.errors import OperatorUnreachable


@dataclass(frozen=True)
class ServerProcess:
    """A `blindtune serve` that runs beside us."""

    url: str
    process: subprocess.Popen[str]
    log: Path


@contextmanager
def local_servers(
    model: str, folders: list[Path], *, threads: int, dtype: str = "float32", more: Sequence[str] = ()
) -> Generator[list[ServerProcess]]:
    """One recording server process on loopback for each folder; ended by SIGTERM, so transcripts are complete.

    Args:
        more: options of `blindtune serve`.
    """
    started: list[tuple[subprocess.Popen[str], Path]] = []
    before = signal.signal(signal.SIGTERM, _leave)  # a killed parent takes its servers along
    try:
        for folder in folders:
            folder.parent.mkdir(parents=True, exist_ok=True)
            log = folder.with_suffix(".log")
            command = [sys.executable, "-m", "blindtune", "serve", "--model", model, "--port", "0", "--no-auth"]
            command += ["--threads", str(threads), "--dtype", dtype, "--record", str(folder), *more]
            environment = {**os.environ, "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
            with log.open("w") as errors:
                process = subprocess.Popen(  # noqa: S603 - our own command line
                    command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
                )
            started.append((process, log))
        yield [_await(process, log) for process, log in started]
    finally:
        signal.signal(signal.SIGTERM, before)
        for process, _ in started:
            process.terminate()
        for process, _ in started:
            process.wait(timeout=60)
            if process.stdout is not None:
                process.stdout.close()


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _await(process: subprocess.Popen[str], log: Path) -> ServerProcess:
    assert process.stdout is not None  # noqa: S101 - it was asked for
    for line in process.stdout:
        if line.startswith("Serving") and " on " in line:
            return ServerProcess(line.split(" on ")[1].split()[0], process, log)
    raise OperatorUnreachable(f"A server ended before it listened (see {log}).", remedy="Read its log.")
