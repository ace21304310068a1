"""Writes files atomically and with explicit permissions, and reads and writes tensor files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from blindtune.errors import CheckpointError

HOME_VARIABLE = "BLINDTUNE_HOME"
PRIVATE, PUBLIC = 0o600, 0o644
"""File modes: readable by the owner alone, or by everyone."""
SUMMARY = "blindtune.json"
"""Name of the file in a checkpoint that describes the run. It holds no tensors and no secrets."""


def home() -> Path:
    """Returns the folder of this user's files: `$BLINDTUNE_HOME`, or `~/.local/share/blindtune`. It is absolute."""
    chosen = Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".local" / "share" / "blindtune")
    return chosen.expanduser().absolute()  # the process may change its working directory


def replace_file(path: Path, content: bytes, mode: int = PUBLIC) -> None:
    """Replaces the content of a file atomically: writes a temporary file beside it, then renames that file.

    The temporary file has the permissions `mode` before any content is written.
    """
    partial = path.with_name(path.name + ".part")
    partial.unlink(missing_ok=True)  # a file left over from a crash may have other permissions
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk, so that a new file name survives a system crash. Does nothing off POSIX."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with the prefix, under their names without the prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Replaces a safetensors file atomically. Only its owner can read it."""
    content = save({name: t.detach().clone().contiguous() for name, t in tensors.items()}, metadata)
    replace_file(path, content, PRIVATE)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the metadata of a safetensors file.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no {path}.", remedy="Name a complete checkpoint that a training run wrote.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}.", remedy="Use another copy of it.") from None
