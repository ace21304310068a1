"""Files that are never half written."""

from __future__ import annotations

import os
from pathlib import Path

PRIVATE, PUBLIC = 0o600, 0o644


def replace_file(path: Path, content: bytes, mode: int = PUBLIC) -> None:
    """Writes beside the file and then takes its place. `mode` holds from the first byte."""
    partial = path.with_name(path.name + ".part")
    partial.unlink(missing_ok=True)  # whatever mode it had
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes a new name in a folder outlive a crash of the machine, where the system can do that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
