"""The journal of a ledger: a file of JSON lines, each of which is on the disk before its message is sent.

The first line holds the format's version and the run's id. A line that a crash left incomplete belongs to a message
that was never sent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from blindtune.errors import CheckpointError
from blindtune.files import PRIVATE, sync_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

JOURNAL = "ledger.jsonl"
FORMAT = 5
TAIL = 256
"""Number of bytes at the end of a journal that are compared to detect a change. They include the last line's id."""


def append_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Appends lines to a journal, which only its owner can read. When this returns, all lines are on the disk.

    If it raises `OSError` because the disk is full, no line was appended. An incomplete last line, which a crash may
    leave, is removed first.
    """
    if not lines:
        return
    new = not path.exists()
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, PRIVATE)
    try:
        _lock(descriptor)  # copies of a run with different machine journals may share a folder, and no other lock
        end = _remove_incomplete_line(descriptor)
        if os.write(descriptor, content) != len(content):
            os.ftruncate(descriptor, end)
            raise OSError("the disk is full")
        os.fsync(descriptor)
    finally:
        _unlock(descriptor)
        os.close(descriptor)
    if new:
        sync_folder(path.parent)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a journal, without an incomplete last line, which a crash may leave.

    Raises:
        CheckpointError: the journal is damaged, or was written by another version.
    """
    content = path.read_bytes()
    return parse_lines(path, content[: content.rfind(b"\n") + 1])


def read_run(path: Path) -> str | None:
    """Returns the id of the run that a journal belongs to; None if the journal is empty or doesn't exist.

    Raises:
        CheckpointError: the journal is damaged, or was written by another version.
    """
    if not path.exists():
        return None
    with path.open("rb") as file:
        first = file.readline()
    lines = parse_lines(path, first if first.endswith(b"\n") else b"")  # a crash may have left it incomplete
    return str(lines[0]["run"]) if lines else None


def read_journal_of(path: Path, run: str | None) -> list[dict[str, Any]]:
    """Returns the lines of a run's journal.

    Args:
        run: id of the run that the journal must belong to; None accepts any run.
    Raises:
        CheckpointError: there is no journal, it is damaged, or it belongs to another run.
    """
    back = f" It may be there as {path.stem}-{run}.jsonl." if run else ""
    if not path.is_file():
        raise CheckpointError(
            f"There is no {path}, so nobody knows what operators have seen of this run.",
            remedy=f"Put the file back.{back} Without it, count the whole budget of the run as spent, and train anew.",
        )
    lines = read_lines(path)
    if not lines:
        raise damaged(path)
    if run not in (None, lines[0]["run"]):
        raise CheckpointError(
            f"{path} counts what operators have seen of another run than the one that is saved beside it: that run "
            "was started in this folder, and interrupted before its first save.",
            remedy=f"Put the journal of this run back.{back}",
        )
    return lines


def journal_state(path: Path) -> tuple[int, int, bytes] | None:
    """Returns a file's inode, size and last bytes, by which a change is detected; None if there is no file.

    The size alone isn't enough: a restored copy may have the same size.
    """
    if not path.exists():
        return None
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        file.seek(max(0, status.st_size - TAIL))
        return status.st_ino, status.st_size, file.read()


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Context manager that turns an `OSError` of writing a journal into a `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be written: {error}.",
            remedy="Make it writable: every message is recorded there before it is sent.",
        ) from None


def unused_name(path: Path, run: str) -> Path:
    """Returns a path in the journal's folder that has the run's id in its name and doesn't exist yet."""
    names = (f"ledger-{run}{suffix}.jsonl" for suffix in ("", *(f"-{number}" for number in range(2, 10**6))))
    return next(other for other in map(path.with_name, names) if not other.exists())


def parse_lines(path: Path, content: bytes) -> list[dict[str, Any]]:
    """Parses the first lines of a journal.

    Args:
        path: the journal, for error messages.
        content: its content, or a part that begins with the first line.
    Raises:
        CheckpointError: the journal is damaged, or was written by another version.
    """
    try:
        lines: list[dict[str, Any]] = [json.loads(line) for line in content.splitlines()]
        version = lines[0]["format"] if lines else FORMAT
        if any("id" not in line for line in lines[1:]):
            raise KeyError("id")
    except (ValueError, KeyError, TypeError):
        raise damaged(path) from None
    if version != FORMAT:
        raise CheckpointError(
            f"{path} was written by another version.",
            remedy="Count that run's budget as spent, and use another folder.",
        )
    return lines


def damaged(path: Path) -> CheckpointError:
    """Returns the error for a damaged journal."""
    return CheckpointError(
        f"{path} is damaged, so nobody knows any more what operators have seen.",
        remedy="Use another copy of it. Without one, count the whole budget of that run as spent.",
    )


def _lock(descriptor: int) -> None:
    """Locks a file against appends of other processes. Does nothing where the system or file system has no locks."""
    if fcntl is not None:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def _unlock(descriptor: int) -> None:
    """Releases the lock explicitly: closing the file isn't enough if a process that was forked keeps it open."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def _remove_incomplete_line(descriptor: int) -> int:
    """Truncates a file after its last complete line. Returns its size in bytes."""
    size = os.fstat(descriptor).st_size
    os.lseek(descriptor, 0, os.SEEK_SET)
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(max(0, size - 1))
        if file.read(1) in (b"\n", b""):
            return size
        file.seek(0)
        size = file.read().rfind(b"\n") + 1
    os.ftruncate(descriptor, size)
    return size
