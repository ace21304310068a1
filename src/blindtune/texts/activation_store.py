"""Stores the trunk's output s_B of each example. With a frozen bottom it never changes, so each example is sent once.

It is stored in fp16, or in fp32 if it was sent in fp32: rounding int8 a second time, on another grid, would double the
error. If the store has a folder, s_B is also written to disk, so that a resumed run doesn't send an example again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from blindtune.errors import CacheFull, CheckpointError
from blindtune.files import read_tensors, write_tensors
from blindtune.wire import Codec, dequantize, quantize

MEGABYTE = 2**20


class ActivationStore:
    """Holds s_B of token rows, up to `max_bytes`.

    Args:
        dim: d, the hidden size.
        codec: codec in which s_B was sent.
        max_bytes: largest total size in bytes.
        folder: folder for the files, one for each call of `save`. Default: in memory only.
        identity: string that names everything that s_B depends on besides the tokens (weights, bottom, codec). Files
            with another identity are refused.
    Raises:
        CheckpointError: the folder holds hidden states of another model, or a damaged file.
    """

    def __init__(
        self, dim: int, codec: Codec, *, max_bytes: int, folder: Path | None = None, identity: str = ""
    ) -> None:
        self.dim, self.max_bytes, self.folder, self.identity = dim, max_bytes, folder, identity
        self.codec: Codec = "fp32" if codec == "fp32" else "fp16"
        self._stored: dict[str, dict[str, Tensor]] = {}
        self._unsaved: list[str] = []
        self._files = 0
        self.nbytes = 0
        """Total size of the stored hidden states in bytes."""
        if folder is not None and folder.is_dir():
            self._read(folder)

    def __contains__(self, row: Sequence[int]) -> bool:
        return _key(row) in self._stored

    def __len__(self) -> int:
        return len(self._stored)

    def check_room(self, tokens: int) -> None:
        """Raises `CacheFull` if the hidden states of `tokens` more tokens don't fit. Call it before sending them."""
        per_token = sum(t.nbytes for t in quantize("hidden", torch.zeros(64, self.dim), self.codec).values()) / 64
        needed = self.nbytes + round(tokens * per_token)
        if needed > self.max_bytes:
            raise CacheFull(
                f"Hidden states of {tokens} more tokens need {needed / MEGABYTE:.1f} MiB in all; "
                f"{self.max_bytes / MEGABYTE:.1f} MiB are allowed.",
                remedy="Raise --training cache_mb, or shorten the texts (--max-length).",
            )

    def put(self, row: Sequence[int], hidden: Tensor) -> None:
        """Stores s_B `(L, d)` of a token row. Raises `CacheFull`, and then stores nothing."""
        tensors = quantize("hidden", hidden, self.codec)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.nbytes + size > self.max_bytes:
            raise CacheFull(
                f"The store has {self.nbytes / MEGABYTE:.1f} of {self.max_bytes / MEGABYTE:.1f} MiB; "
                f"{len(row)} tokens don't fit.",
                remedy="Raise --training cache_mb. Texts that are stored already aren't sent again.",
            )
        key = _key(row)
        self._stored[key] = tensors
        self._unsaved.append(key)
        self.nbytes += size

    def get(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Returns s_B `(B, L, d)`, zero at padding. Raises `KeyError` for a row that isn't stored."""
        result = torch.zeros(len(rows), max(len(row) for row in rows), self.dim)
        for index, row in enumerate(rows):
            result[index, : len(row)] = dequantize("hidden", self._stored[_key(row)], self.codec, self.dim)
        return result

    def save(self) -> None:
        """Writes the hidden states that aren't on disk yet."""
        if self.folder is None or not self._unsaved:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{key}/{name}": tensor for key in self._unsaved for name, tensor in self._stored[key].items()}
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
                self._stored.setdefault(key, {})[part] = tensor
                self.nbytes += tensor.nbytes
            self._files += 1


def _key(row: Sequence[int]) -> str:
    return hashlib.sha256(repr(tuple(row)).encode()).hexdigest()[:32]
