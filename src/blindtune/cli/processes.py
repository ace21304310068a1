"""Starts servers as child processes of a command, waits until they listen, and stops them when the command ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from blindtune.errors import OperatorUnreachable


@dataclass(frozen=True)
class ServerProcess:
    """A running `blindtune serve`: its address, its process, and its log file."""

    url: str
    process: subprocess.Popen[str]
    log: Path


@contextmanager
def local_servers(
    model: str,
    folders: list[Path],
    *,
    threads: int,
    dtype: str = "float32",
    token_file: Path | None = None,
    more: Sequence[str] = (),
) -> Generator[list[ServerProcess]]:
    """Starts a server process on loopback for each folder. The server writes its transcript to the folder.

    When the context ends, the servers get SIGTERM, so that they complete their transcripts.

    Args:
        threads: number of torch threads of each server.
        token_file: file of the tenants' tokens; the servers need no token if None.
        more: further options of `blindtune serve`.
    Raises:
        OperatorUnreachable: a server exited before it listened.
    """
    started: list[tuple[subprocess.Popen[str], Path]] = []
    before = signal.signal(signal.SIGTERM, _leave)  # so that the servers are stopped if this command gets SIGTERM
    try:
        for folder in folders:
            folder.parent.mkdir(parents=True, exist_ok=True)
            log = folder.with_suffix(".log")
            command = [sys.executable, "-m", "blindtune", "serve", "--model", model, "--port", "0"]
            command += ["--no-auth"] if token_file is None else ["--token-file", str(token_file)]
            command += ["--threads", str(threads), "--dtype", dtype, "--record", str(folder), *more]
            environment = {**os.environ, "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
            with log.open("w") as errors:
                process = subprocess.Popen(  # noqa: S603 - our own command line
                    command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
                )
            started.append((process, log))
        yield [_await(process, process.stdout or (), log) for process, log in started]
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


def _await(process: subprocess.Popen[str], output: Iterable[str], log: Path) -> ServerProcess:
    """Reads the lines that a server prints until it listens. Raises `OperatorUnreachable` if it exits before."""
    for line in output:
        if line.startswith("Serving") and " on " in line:
            return ServerProcess(line.split(" on ")[1].split()[0], process, log)
    raise OperatorUnreachable("A server exited before it listened.", remedy=f"Read its log, {log}.")
