"""What came back for each example, kept: with a frozen bottom s_B never changes, so each example is sent once.

Kept in fp16 (fp32 if it travelled so): rounding int8 a second time, on another grid, would lose as much again. On disk
if a folder is given, so that a resumed run sends nothing again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from blindtune.errors import CacheFull, CheckpointError
from blindtune.methods.state import read_tensors, write_tensors
from blindtune.wire import Codec, dequantize, quantize

MEGABYTE = 2**20


class SmashedStore:
    """s_B of token rows, up to `max_bytes`.

    Args:
        dim: d.
        codec: how s_B travelled.
        folder: where it is written, one file for each `save`.
        identity: of everything that s_B depends on beside the tokens (weights, bottom, codec); files of another are
            refused.
    Raises:
        CheckpointError: the folder holds hidden states of another model, or a damaged file.
    """

    def __init__(
        self, dim: int, codec: Codec, *, max_bytes: int, folder: Path | None = None, identity: str = ""
    ) -> None:
        self.dim, self.max_bytes, self.folder, self.identity = dim, max_bytes, folder, identity
        self.codec: Codec = "fp32" if codec == "fp32" else "fp16"
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._unsaved: list[str] = []
        self._files = 0
        self.nbytes = 0
        if folder is not None and folder.is_dir():
            self._read(folder)

    def __contains__(self, row: Sequence[int]) -> bool:
        return _key(row) in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def check_room(self, tokens: int) -> None:
        """Raises `CacheFull` if hidden states of so many more tokens have no room; before anything is sent."""
        one = sum(t.nbytes for t in quantize("hidden", torch.zeros(64, self.dim), self.codec).values()) / 64
        needed = self.nbytes + round(tokens * one)
        if needed > self.max_bytes:
            raise CacheFull(
                f"Hidden states of {tokens} more tokens need {needed / MEGABYTE:.1f} MiB in all; "
                f"{self.max_bytes / MEGABYTE:.1f} MiB are allowed.",
                remedy="Raise --cache-mb, or shorten the texts (--max-length).",
            )

    def put(self, row: Sequence[int], hidden: Tensor) -> None:
        """Keeps s_B `(L, d)` of a token row. Raises `CacheFull`; then nothing has changed."""
        kept = quantize("hidden", hidden, self.codec)
        size = sum(tensor.nbytes for tensor in kept.values())
        if self.nbytes + size > self.max_bytes:
            raise CacheFull(
                f"The store has {self.nbytes / MEGABYTE:.1f} of {self.max_bytes / MEGABYTE:.1f} MiB; "
                f"{len(row)} tokens don't fit.",
                remedy="Raise --cache-mb; what is kept stays.",
            )
        key = _key(row)
        self._kept[key] = kept
        self._unsaved.append(key)
        self.nbytes += size

    def get(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """s_B `(B, L, d)`, zero where there is padding. Raises `KeyError` for a row that isn't kept."""
        result = torch.zeros(len(rows), max(len(row) for row in rows), self.dim)
        for index, row in enumerate(rows):
            result[index, : len(row)] = dequantize("hidden", self._kept[_key(row)], self.codec, self.dim)
        return result

    def save(self) -> None:
        """Writes what isn't on disk yet."""
        if self.folder is None or not self._unsaved:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{key}/{name}": tensor for key in self._unsaved for name, tensor in self._kept[key].items()}
        write_tensors(self.folder / f"smashed-{self._files:05d}.safetensors", tensors, {"identity": self.identity})
        self._files += 1
        self._unsaved = []

    def _read(self, folder: Path) -> None:
        for path in sorted(folder.glob("smashed-*.safetensors")):
            tensors, metadata = read_tensors(path)
            if metadata.get("identity") != self.identity:
                raise CheckpointError(
                    f"{path} holds hidden states of another model, bottom or codec.",
                    remedy="Use another folder (--output), or remove the file.",
                )
            for name, tensor in tensors.items():
                key, part = name.split("/")
                self._kept.setdefault(key, {})[part] = tensor
                self.nbytes += tensor.nbytes
            self._files += 1


def _key(row: Sequence[int]) -> str:
    return hashlib.sha256(repr(tuple(row)).encode()).hexdigest()[:32]
