"""Tensors of a run: names in a method's state (`part.name`), and the files that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from blindtune.errors import CheckpointError
from blindtune.files import PRIVATE, replace_file

SUMMARY = "blindtune.json"
"""What a checkpoint tells of the run that made it; no tensors, no secrets."""


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Replaces the file in one step; for its owner's eyes alone."""
    content = save({name: t.detach().clone().contiguous() for name, t in tensors.items()}, metadata)
    replace_file(path, content, PRIVATE)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and its metadata.

    Raises:
        CheckpointError: no such file, or a damaged one.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no {path}.", remedy="Name a complete checkpoint of `blindtune train`.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}.", remedy="Use another copy of it.") from None
