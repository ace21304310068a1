"""Codecs of hidden states: bounds on what they lose, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blindtune.errors import CodecMismatch, ConfigError, InvalidTensor, NonFiniteTensor
from blindtune.wire import CODECS, Codec, dequantize, quantize

DIM = 100  # no multiple of int4's groups


def hidden(scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, DIM, generator=generator)
    values[3] *= 300  # a token as loud as the first one of a decoder
    values[5] = 0
    return values * scale


def through(values: Tensor, codec: Codec, generator: torch.Generator | None = None) -> Tensor:
    return dequantize("h", quantize("h", values, codec, generator=generator), codec, values.shape[1])


def step(values: Tensor, codec: Codec) -> Tensor:
    """The distance of two levels, for each value."""
    if codec == "int8":
        return values.abs().amax(1, keepdim=True).expand_as(values) / 127
    groups = torch.nn.functional.pad(values, (0, -DIM % 64)).reshape(len(values), -1, 64).abs().amax(2)
    return groups.repeat_interleave(64, 1)[:, :DIM] / 7


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e-35, 1e6], ids=["activations", "gradients", "tiny", "large"])
@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_to_the_nearest_step(codec: Codec, scale: float) -> None:
    values = hidden(scale)
    assert bool(((through(values, codec) - values).abs() <= 0.5 * 1.002 * step(values, codec) + 1e-45).all())


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e6])
def test_fp16_keeps_eleven_bits(scale: float) -> None:
    values = hidden(scale)
    loud = values.abs() > values.abs().max() * 1e-4
    assert bool((((through(values, "fp16") - values).abs() <= 2**-11 * values.abs()) | ~loud).all())


def test_fp32_changes_nothing() -> None:
    assert torch.equal(through(hidden(1e-9), "fp32"), hidden(1e-9))


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_random_rounding_has_the_right_mean(codec: Codec) -> None:
    values, generator = hidden(), torch.Generator().manual_seed(1)
    mean = torch.stack([through(values, codec, generator) for _ in range(400)]).mean(0)
    nearest = (through(values, codec) - values).abs() / step(values, codec).clamp_min(1e-9)
    bias = (mean - values).abs() / step(values, codec).clamp_min(1e-9)
    assert float(nearest.mean()) > 0.2  # a step's rounding error …
    assert float(bias.mean()) < 0.03  # … is gone on average (standard error of 400: .02)


@pytest.mark.parametrize(("codec", "least"), [("fp16", 1.99), ("int8", 3.8), ("int4", 6.5)])
def test_fewer_bytes(codec: Codec, least: float) -> None:
    values = torch.randn(1000, 576)
    assert values.nbytes / sum(tensor.nbytes for tensor in quantize("h", values, codec).values()) > least


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_are_refused(codec: Codec, bad: float) -> None:
    values = hidden()
    values[2, 2] = bad
    with pytest.raises(NonFiniteTensor, match="1 values"):
        quantize("h", values, codec)


@pytest.mark.parametrize("codec", CODECS)
def test_one_token_and_none(codec: Codec) -> None:
    assert through(hidden()[:1], codec).shape == (1, DIM)
    assert through(hidden()[:0], codec).shape == (0, DIM)


def test_another_codec_than_the_message_says() -> None:
    with pytest.raises(CodecMismatch, match=r"int8.*float32"):
        dequantize("h", quantize("h", hidden(), "int8"), "fp32", DIM)


def test_tensors_that_do_not_fit_together() -> None:
    sent = quantize("h", hidden(), "int8")
    with pytest.raises(InvalidTensor, match=r"h\.scales"):
        dequantize("h", {**sent, "h.scales": sent["h.scales"][:5]}, "int8", DIM)
    with pytest.raises(InvalidTensor, match=r"h\.values"):
        dequantize("h", sent, "int8", DIM + 1)


def test_scales_that_explode_are_refused() -> None:
    sent = quantize("h", hidden(), "int8")
    with pytest.raises(NonFiniteTensor):
        dequantize("h", {**sent, "h.exponent": torch.tensor([900], dtype=torch.int32)}, "int8", DIM)


def test_an_unknown_codec() -> None:
    with pytest.raises(ConfigError, match="int2"):
        quantize("h", hidden(), "int2")  # pyright: ignore[reportArgumentType] - the mistake
