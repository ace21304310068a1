"""Pooling: reduces the hidden states of all positions to one vector, the input of the client's head."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from blindtune.errors import UnknownPooling
from blindtune.wire import Architecture, Pooling

POOLINGS: dict[Architecture, list[Pooling]] = {
    "encoder": ["cls", "mean", "none"],
    "decoder": ["last", "mean", "none"],
    "encoder-decoder": ["first", "none"],
}


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Pools hidden states `(B, L, d)` with a right-padded mask `(B, L)` to `(B, d)`; `none` keeps `(B, L, d)`.

    Raises:
        UnknownPooling: there is no such pooling.
    """
    if pooling == "none":
        return hidden
    if pooling in ("cls", "first"):
        return hidden[:, 0]
    if pooling == "mean":
        weights = mask.to(hidden.dtype).unsqueeze(-1)  # (B, L, 1)
        return (hidden * weights).sum(1) / weights.sum(1)
    if pooling == "last":
        last = mask.sum(1) - 1  # (B,)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    raise UnknownPooling(f"There is no pooling {pooling!r}.", remedy="Use cls, mean, last, first or none.")


def default_pooling(architecture: Architecture, folder: str) -> Pooling:
    """Returns a model's default pooling: its sentence-transformers setting, if any, else that of its architecture."""
    setting = Path(folder) / "1_Pooling" / "config.json"
    if architecture == "encoder" and setting.is_file():
        wants_mean = json.loads(setting.read_text()).get("pooling_mode_mean_tokens", False)
        return "mean" if wants_mean else "cls"
    return POOLINGS[architecture][0]
