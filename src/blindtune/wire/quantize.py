"""Hidden states and their gradients in fewer bits: fp32, fp16, int8 for each token, int4 in groups of 64.

    int8    x ≈ s_n q,  q ∈ {−127 … 127},  s_n = max |x_n| / 127 of the token n
    int4    the same with {−7 … 7}, for each 64 consecutive values of a token; two values in a byte

Scales are fp16, in units of 2^e that the largest one decides, so that gradients of 1e-9 don't vanish. Activations are
rounded to the nearest step, gradients at random so that their mean is right. Either way |x − x̂| is at most half a step,
or a whole one: max |x_n| / 254 (int8), max |group| / 14 (int4), 2⁻¹¹ |x| (fp16), up to 0.2% for the rounding of scales.

Fewer bits are no privacy: what is left of a token is enough to tell which one it was.
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
"""Scales are rounded up, so that no value lies beyond the last level."""


def quantize(name: str, values: Tensor, codec: Codec, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Tensors `name.values` (and `name.scales`, `name.exponent`) that travel for `values [N, d]`.

    Args:
        generator: of the CPU; rounds at random, up as often as it takes for the mean to be right. To the nearest step
            without.
    Raises:
        NonFiniteTensor: NaN or infinity.
        ConfigError: no such codec.
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
    travelling = {f"{name}.exponent": torch.tensor([exponent], dtype=torch.int32, device=values.device)}
    if codec == "fp16":
        return {**travelling, f"{name}.values": scaled.half()}
    levels = _LEVELS[codec]
    groups = scaled.unsqueeze(1) if codec == "int8" else _grouped(scaled)  # (N, groups, in a group)
    scales = (groups.abs().amax(-1) / levels * _UP).half()  # (N, groups)
    steps = scales.double().unsqueeze(-1)
    whole = torch.where(steps > 0, groups / steps.clamp_min(1e-30), 0.0)
    if generator is None:
        whole = whole.round()
    else:
        drawn = torch.rand(whole.shape, generator=generator, dtype=torch.float64)
        whole = (whole + drawn.to(whole.device)).floor()
    whole = whole.clamp(-levels, levels).to(torch.int8)
    packed = whole.flatten(1) if codec == "int8" else _pack(whole.flatten(1))
    return {**travelling, f"{name}.values": packed, f"{name}.scales": scales}


def dequantize(name: str, tensors: Mapping[str, Tensor], codec: Codec, dim: int) -> Tensor:
    """The values `[N, dim]`, float32.

    Raises:
        CodecMismatch: tensors of another codec.
        InvalidTensor, NonFiniteTensor: tensors that don't fit together, or NaN.
    """
    values = tensors.get(f"{name}.values")
    expected = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8, "int4": torch.uint8}[codec]
    if values is not None and values.dtype != expected:
        raise CodecMismatch(
            f"{name!r} travels as {values.dtype}; the message says {codec}, which is {expected}.",
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
        whole = values if codec == "int8" else _unpack(values)
        by_group = whole.unflatten(1, (groups, whole.shape[1] // groups)).double() * scales.double().unsqueeze(-1)
        result = torch.ldexp(by_group.flatten(1)[:, :dim], exponent)
    result = result.float()
    check_finite(name, result)
    return result


def _grouped(values: Tensor) -> Tensor:
    """`(N, groups, 64)`, filled up with zeros."""
    missing = -values.shape[1] % GROUP
    padded = torch.nn.functional.pad(values, (0, missing))
    return padded.unflatten(1, (padded.shape[1] // GROUP, GROUP))


def _pack(whole: Tensor) -> Tensor:
    """Two values of −7 … 7 in a byte, the first in the low half."""
    shifted = (whole + 8).to(torch.uint8)
    return shifted[:, ::2] | (shifted[:, 1::2] << 4)


def _unpack(packed: Tensor) -> Tensor:
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    return halves.to(torch.int8) - 8
