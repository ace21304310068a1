"""Readout: reduces the hidden states of all layers and positions to the vectors that the client asked for.

h_i  (B, L, d)  states i = 0 … N of a model with N blocks
──▶  pooled over positions, (B, d) each, or kept for pooling `none`
──▶  concatenated over the chosen layers, (B, k · d)
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blindtune.errors import UnknownReadout
from blindtune.keystream import Keystream
from blindtune.wire import Architecture, Pooling, Projection, Readout

POOLINGS: dict[Architecture, list[Pooling]] = {
    "encoder": ["cls", "mean", "max", "none"],
    "decoder": ["last", "mean", "max", "none"],
    "encoder-decoder": ["first", "none"],
}


def check_readout(readout: Readout, poolings: Sequence[Pooling], states: int, hidden_size: int) -> None:
    """Checks that a model offers a readout.

    Args:
        poolings: the poolings that the model offers.
        states: number of states that it offers.
        hidden_size: d.
    Raises:
        UnknownReadout: it doesn't offer the pooling, a layer or the projection; or layers aren't in rising order.
    """
    if readout.pooling not in poolings:
        raise UnknownReadout(
            f"The model offers no pooling {readout.pooling!r}.", remedy=f"Choose among: {', '.join(poolings)}."
        )
    if list(readout.layers) != sorted(set(readout.layers)):
        raise UnknownReadout(
            f"The layers {list(readout.layers)} aren't in rising order, each once.", remedy="Sort them."
        )
    if readout.layers and readout.layers[-1] >= states:
        raise UnknownReadout(
            f"There is no layer {readout.layers[-1]}.",
            remedy=f"Choose layers from 0 (the input of the first block) to {states - 1} (the model's output).",
        )
    if readout.projection is not None and readout.projection.size > hidden_size:
        raise UnknownReadout(
            f"A projection to {readout.projection.size} values is wider than the model's {hidden_size}.",
            remedy=f"Use at most {hidden_size}, or none.",
        )


def read_out(states: Sequence[Tensor], mask: Tensor, readout: Readout) -> Tensor:
    """Pools, projects and concatenates the chosen states.

    Args:
        states: the chosen states `(B, L, d)` in the order of `readout.layers`.
        mask: right-padded mask `(B, L)`.
    Returns:
        `(B, k · d)`, or `(B, L, k · d)` for pooling `none`; with a projection its size in place of d.
    """
    vectors: list[Tensor] = []
    for hidden in states:
        pooled = pool(hidden, mask, readout.pooling)
        if readout.projection is not None:
            pooled = pooled @ projection_matrix(readout.projection, hidden.shape[-1]).to(pooled)
        vectors.append(pooled)
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=-1)


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Pools hidden states `(B, L, d)` with a right-padded mask `(B, L)` to `(B, d)`; `none` keeps `(B, L, d)`.

    Raises:
        UnknownReadout: there is no such pooling.
    """
    if pooling == "none":
        return hidden
    if pooling in ("cls", "first"):
        return hidden[:, 0]
    if pooling == "mean":
        weights = mask.to(hidden.dtype).unsqueeze(-1)  # (B, L, 1)
        return (hidden * weights).sum(1) / weights.sum(1)
    if pooling == "max":
        return hidden.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(1)
    if pooling == "last":
        last = mask.sum(1) - 1  # (B,)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    raise UnknownReadout(f"There is no pooling {pooling!r}.", remedy="Use cls, mean, max, last, first or none.")


@lru_cache(maxsize=4)
def projection_matrix(projection: Projection, hidden_size: int) -> Tensor:
    """Returns the matrix R `(d, size)` of a public projection: signs of its seed's keystream, times 1 / √size.

    Products with R keep distances in expectation (Johnson and Lindenstrauss; Achlioptas 2003, signs).
    """
    count = hidden_size * projection.size
    stream = Keystream(bytes.fromhex(projection.seed)).bytes(-(-count // 8))
    bits = np.unpackbits(np.frombuffer(stream, dtype=np.uint8))[:count]
    signs = torch.from_numpy(bits.astype(np.float32)) * 2.0 - 1.0
    return (signs / math.sqrt(projection.size)).reshape(hidden_size, projection.size)


def default_pooling(architecture: Architecture, folder: str) -> Pooling:
    """Returns a model's default pooling: its sentence-transformers setting, if any, else that of its architecture."""
    setting = Path(folder) / "1_Pooling" / "config.json"
    if architecture == "encoder" and setting.is_file():
        wants_mean = json.loads(setting.read_text()).get("pooling_mode_mean_tokens", False)
        return "mean" if wants_mean else "cls"
    return POOLINGS[architecture][0]
