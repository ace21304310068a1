"""Quantization of hidden states and their gradients: fp32, fp16, int8 per token, int4 in groups of 64.

    int8    x ≈ s_n q,  q ∈ {−127 … 127},  s_n = max |x_n| / 127 of the token n
    int4    the same with {−7 … 7}, for each 64 consecutive values of a token; two values in a byte

Scales are fp16 multiples of 2^e, where the largest value determines e, so that gradients of 1e-9 don't underflow.
Activations are rounded to the nearest step, gradients stochastically and without bias. So |x − x̂| is at most half a
step (nearest) or one step (stochastic). Half a step is max |x_n| / 254 (int8), max |group| / 14 (int4) or
2⁻¹¹ |x| (fp16), up to 0.2% for the rounding of scales.

Quantization gives no privacy: what remains of a token's hidden state is enough to identify the token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from blindtune.errors import CodecMismatch, ConfigError
from blindtune.wire.codec import check_finite, check_tensor
from blindtune.wire.schema import CODECS, Codec

GROUP = 64
_LEVELS = {"int8": 127, "int4": 7}
_UP = 1 + 2**-10
"""Factor by which scales are rounded up, so that no value lies beyond the last level."""


def quantize(name: str, values: Tensor, codec: Codec, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Returns the tensors that represent `values [N, d]` on the wire: `name.values` (`name.scales`, `name.exponent`).

    Args:
        generator: CPU generator for stochastic rounding without bias. None: round to the nearest step.
    Raises:
        NonFiniteTensor: a value is NaN or infinite.
        ConfigError: there is no such codec.
    """
    if codec not in CODECS:
        raise ConfigError(f"There is no codec {codec!r}.", remedy=f"Use one of: {', '.join(CODECS)}.")
    check_finite(name, values)
    values = values.detach().float()
    if codec == "fp32":
        return {f"{name}.values": values.contiguous()}
    largest = float(values.abs().max()) if values.numel() else 0.0
    exponent = math.frexp(largest)[1] - 15 if largest > 0 else 0
    scaled = torch.ldexp(values.double(), torch.tensor(-float(exponent), dtype=torch.float64))
    encoded = {f"{name}.exponent": torch.tensor([exponent], dtype=torch.int32, device=values.device)}
    if codec == "fp16":
        return {**encoded, f"{name}.values": scaled.half()}
    levels = _LEVELS[codec]
    groups = scaled.unsqueeze(1) if codec == "int8" else _grouped(scaled)  # (N, groups, in a group)
    scales = (groups.abs().amax(-1) / levels * _UP).half()  # (N, groups)
    steps = scales.double().unsqueeze(-1)
    levels_of = torch.where(steps > 0, groups / steps.clamp_min(1e-30), 0.0)
    if generator is None:
        rounded = levels_of.round()
    else:
        drawn = torch.rand(levels_of.shape, generator=generator, dtype=torch.float64)
        rounded = (levels_of + drawn.to(levels_of.device)).floor()
    integers = rounded.clamp(-levels, levels).to(torch.int8).flatten(1)
    packed = integers if codec == "int8" else _pack(integers)
    return {**encoded, f"{name}.values": packed, f"{name}.scales": scales}


def dequantize(name: str, tensors: Mapping[str, Tensor], codec: Codec, dim: int) -> Tensor:
    """Returns the values `[N, dim]`, float32, that the tensors of `quantize` represent.

    Raises:
        CodecMismatch: the tensors are in another codec.
        InvalidTensor, NonFiniteTensor: the tensors don't fit together, or hold NaN or infinity.
    """
    values = tensors.get(f"{name}.values")
    expected = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8, "int4": torch.uint8}[codec]
    if values is not None and values.dtype != expected:
        raise CodecMismatch(
            f"{name!r} was sent as {values.dtype}; the message says {codec}, which is {expected}.",
            remedy="Encode and describe tensors with one codec.",
        )
    width = dim if codec != "int4" else (-(-dim // GROUP) * GROUP) // 2
    values = check_tensor(tensors, f"{name}.values", (None, width), expected)
    if codec == "fp32":
        return values
    exponent = check_tensor(tensors, f"{name}.exponent", (1,), torch.int32).double()
    if codec == "fp16":
        result = torch.ldexp(values.double(), exponent)
    else:
        groups = 1 if codec == "int8" else width * 2 // GROUP
        scales = check_tensor(tensors, f"{name}.scales", (len(values), groups), torch.float16)
        integers = values if codec == "int8" else _unpack(values)
        grouped = integers.unflatten(1, (groups, integers.shape[1] // groups)).double()
        by_group = grouped * scales.double().unsqueeze(-1)
        result = torch.ldexp(by_group.flatten(1)[:, :dim], exponent)
    result = result.float()
    check_finite(name, result)
    return result


def _grouped(values: Tensor) -> Tensor:
    """Returns the values `(N, groups, 64)`, padded with zeros."""
    missing = -values.shape[1] % GROUP
    padded = torch.nn.functional.pad(values, (0, missing))
    return padded.unflatten(1, (padded.shape[1] // GROUP, GROUP))


def _pack(integers: Tensor) -> Tensor:
    """Packs two values of −7 … 7 into a byte, the first in the low half."""
    shifted = (integers + 8).to(torch.uint8)
    return shifted[:, ::2] | (shifted[:, 1::2] << 4)


def _unpack(packed: Tensor) -> Tensor:
    """Returns the values that `_pack` packed, int8."""
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    return halves.to(torch.int8) - 8
