"""Tangents: how hidden states change with a LoRA adapter's B matrices at B = 0, along public directions.

J(x) v = ∂/∂ε h(x, ε v) at ε = 0  ≈  (h(x, ε v) − h(x, −ε v)) / 2ε,   v (P,): signs, from a public seed

The adapter's A is fixed, and expanded from the same seed. Products J(x) v for random v sketch the Jacobian J(x), and so
the neural tangent kernel of LoRA: E[⟨J(x) v, J(x') v⟩] = ⟨J(x), J(x')⟩ / r (Jacot et al. 2018). Differences of states
need no autograd, and the pass for several adapters computes them.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from blindtune.errors import ConfigError
from blindtune.keystream import Keystream
from blindtune.models.backbone import FrozenBackbone, Tokens
from blindtune.models.lora import LoraLayout, ModuleShapes
from blindtune.wire import Directions, LoraSpec, ModelInfo, Readout

AT_ONCE = 4
"""Number of directions in one pass through the model, which has two adapters for each."""


def check_offered(directions: Directions, readout: Readout, info: ModelInfo) -> None:
    """Checks, on the client, that a hosted model offers tangents.

    Raises:
        ConfigError: there are too many directions, their rank is too large, or the pooling is `none`.
        UnknownTargetModule, AdapterMismatch: see `LoraLayout`.
    """
    limits, last = info.limits, directions.first + directions.count
    if last > limits.max_directions or directions.rank > limits.max_rank:
        raise ConfigError(
            f"{last} directions of rank {directions.rank} are more than {info.name!r} offers: "
            f"{limits.max_directions}, of rank {limits.max_rank}.",
            remedy="Use fewer directions, or a lower rank.",
        )
    if readout.pooling == "none":
        raise ConfigError("Tangents of single tokens aren't fetched.", remedy="Use another pooling than none.")
    directions_layout(directions, info.modules)


def directions_layout(directions: Directions, shapes: ModuleShapes) -> LoraLayout:
    """Returns the layout of the directions `(P,)`: B of each module.

    Raises:
        UnknownTargetModule, AdapterMismatch: see `LoraLayout`.
    """
    spec = LoraSpec(modules=directions.modules, rank=directions.rank, scaling=1.0, a_seed=directions.seed)
    return LoraLayout(spec, shapes)


def expand_directions(directions: Directions, size: int) -> Tensor:
    """Expands the seed into directions `(count, P)`: signs of a keystream for each, times 1 / √r.

    So they are equal on every machine, and change each module's output by about the size of its input, whatever the
    rank.
    """
    seed, last = bytes.fromhex(directions.seed), directions.first + directions.count
    return torch.stack([_direction(seed, index, size) for index in range(directions.first, last)]) / math.sqrt(
        directions.rank
    )


def tangents(backbone: FrozenBackbone, tokens: Tokens, readout: Readout, directions: Directions) -> Tensor:
    """Computes J(x) v for each direction by central differences.

    The step ε is half the cube root of the dtype's precision, where errors of rounding and of the difference are about
    the same: 0.0025 in float32, for relative errors of about 1e-4 (measured on BERT, DeBERTa and Llama). It is the same
    in float64, as some models normalise in float32.

    Returns:
        `(count, B, k · d)`, or `(count, B, L, k · d)` for pooling `none`, as `FrozenBackbone.forward`.
    Raises:
        UnknownTargetModule, AdapterMismatch: see `LoraLayout`.
        RequestError: see `FrozenBackbone.forward`.
    """
    layout = directions_layout(directions, backbone.lora.shapes)
    vectors = expand_directions(directions, layout.size)
    step = max(torch.finfo(backbone.dtype).eps, torch.finfo(torch.float32).eps) ** (1 / 3) / 2.0
    precision = torch.float64 if backbone.dtype == torch.float64 else torch.float32
    results: list[Tensor] = []
    with torch.no_grad():
        for part in vectors.to(precision).split(AT_ONCE):
            hidden = backbone.forward(tokens, readout, layout, torch.cat([step * part, -step * part]))
            plus, minus = hidden.chunk(2)
            results.append((plus - minus) / (2.0 * step))
    return torch.cat(results)


@lru_cache(maxsize=512)
def _direction(seed: bytes, index: int, size: int) -> Tensor:
    key = hashlib.sha256(b"blindtune direction" + seed + index.to_bytes(8, "little")).digest()
    bits = np.unpackbits(np.frombuffer(Keystream(key).bytes(-(-size // 8)), dtype=np.uint8))[:size]
    return torch.from_numpy(bits.astype(np.int8)) * 2 - 1  # int8, so that the cache stays small
