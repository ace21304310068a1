"""The keystream that all secret randomness comes from: the same at both ends, and one that can be checked by hand."""

import math
import struct

import pytest

from blindtune.keystream import Keystream

RFC_8439_ZERO_KEY = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
SEED = bytes(range(32))


def test_the_stream_is_chacha20():
    """Appendix A.1 of RFC 8439, test vector 1."""
    assert Keystream(bytes(32)).bytes(32).hex() == RFC_8439_ZERO_KEY


def test_normal_numbers_are_box_muller_of_the_stream():
    """The same formula in plain Python, from the raw bytes."""
    words = struct.unpack("<6Q", Keystream(SEED).bytes(48))
    uniform = [((word >> 11) + 1) * 2.0**-53 for word in words]
    radius = [math.sqrt(-2 * math.log(u)) for u in uniform[:3]]
    angle = [2 * math.pi * u for u in uniform[3:]]
    expected = [r * math.cos(a) for r, a in zip(radius, angle, strict=True)]
    expected += [r * math.sin(a) for r, a in zip(radius, angle, strict=True)]
    assert Keystream(SEED).normal(2, 3).flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_a_key_of_another_length_is_refused():
    with pytest.raises(ValueError, match="31 bytes"):
        Keystream(bytes(31))
