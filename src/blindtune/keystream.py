"""A ChaCha20 keystream, and random numbers that are drawn from it. `blindtune.lattice` uses it for its noise.

Torch's generators are not cryptographic: their state can be reconstructed from their output, so no secret may depend
on them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor

KEY_BYTES = 32


class Keystream:
    """A deterministic stream of random numbers, expanded from a key of 32 bytes.

    Raises:
        ValueError: the key has another length.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"The key has {len(key)} bytes; it needs {KEY_BYTES}.")
        self._stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()

    def bytes(self, count: int) -> bytes:
        """Returns the next `count` bytes of the keystream."""
        return self._stream.update(bytes(count))

    def uniform(self, *shape: int) -> Tensor:
        """Returns uniform random numbers on (0, 1], float64, with 53 random bits each."""
        bits = np.frombuffer(self.bytes(8 * math.prod(shape)), dtype="<u8") >> 11
        return torch.from_numpy((bits.astype(np.float64) + 1.0) * 2.0**-53).reshape(shape)

    def normal(self, *shape: int) -> Tensor:
        """Returns standard normal random numbers, float64 (Box-Muller transform)."""
        count = math.prod(shape)
        half = (count + 1) // 2
        radius = torch.sqrt(-2.0 * torch.log(self.uniform(half)))
        angle = 2.0 * math.pi * self.uniform(half)
        both = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])
        return both[:count].reshape(shape)
