"""Noise from a seed: the same numbers on both sides of the wire, from a generator that can be checked by hand."""

import math
import struct

import pytest
import torch

from blindtune.keystream import NOISE_VERSION, Keystream, expand_noise

RFC_8439_ZERO_KEY = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
SEED = bytes(range(32))
VECTOR = [0.3982717, -1.4273418, -1.2660797, -0.6812748]


def test_the_stream_is_chacha20():
    """Appendix A.1 of RFC 8439, test vector 1."""
    assert Keystream(bytes(32)).bytes(32).hex() == RFC_8439_ZERO_KEY


def test_noise_is_box_muller_of_the_stream():
    """The same formula in plain Python, from the raw bytes."""
    words = struct.unpack("<6Q", Keystream(SEED).bytes(48))
    uniform = [((word >> 11) + 1) * 2.0**-53 for word in words]
    radius = [math.sqrt(-2 * math.log(u)) for u in uniform[:3]]
    angle = [2 * math.pi * u for u in uniform[3:]]
    expected = [r * math.cos(a) for r, a in zip(radius, angle, strict=True)]
    expected += [r * math.sin(a) for r, a in zip(radius, angle, strict=True)]
    found = expand_noise(SEED, (2, 3), 100.0)
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == pytest.approx([100 * value for value in expected], rel=1e-6)


def test_version_1_is_what_it_was():
    """Test vector: another implementation that speaks version 1 must give these."""
    assert NOISE_VERSION == 1
    assert expand_noise(SEED, (1, 4), 1.0).flatten().tolist() == pytest.approx(VECTOR, rel=1e-6)


def test_noise_is_standard_normal():
    noise = expand_noise(SEED, (200_000,), 3.0).double()
    assert abs(float(noise.mean())) < 0.03
    assert float(noise.std()) == pytest.approx(3.0, rel=0.01)
    assert float((noise / 3).pow(4).mean()) == pytest.approx(3.0, rel=0.05)
    assert float((noise.abs() / 3 < 1.96).double().mean()) == pytest.approx(0.95, abs=0.003)


def test_a_key_of_another_length_is_refused():
    with pytest.raises(ValueError, match="31 bytes"):
        Keystream(bytes(31))
