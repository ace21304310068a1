"""Randomness that an honest-but-curious server can't predict: a ChaCha20 keystream, keyed by the operating system.

Torch's generators are for statistics: their state can be reconstructed from output, so no secret may depend on them.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor

KEY_BYTES = 32


class SecureGenerator:
    """A stream of secret random numbers. Without a key it takes one from the operating system.

    A given key makes the stream repeatable, which a resumed run needs; keep such a key as secret as the labels.

    Raises:
        ValueError: a key that isn't 32 bytes long.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self.key = os.urandom(KEY_BYTES) if key is None else key
        if len(self.key) != KEY_BYTES:
            raise ValueError(f"The key has {len(self.key)} bytes; it needs {KEY_BYTES}.")
        self._stream = Cipher(ChaCha20(self.key, bytes(16)), mode=None).encryptor()

    def derive(self, *context: bytes) -> SecureGenerator:
        """An independent generator for this context: HMAC-SHA-256 of the context under the key.

        Equal contexts give equal streams, different contexts independent ones.
        """
        digest = hmac.new(self.key, digestmod=hashlib.sha256)
        for part in context:
            digest.update(len(part).to_bytes(8, "little") + part)
        return SecureGenerator(digest.digest())

    def bytes(self, count: int) -> bytes:
        """The next bytes of the keystream."""
        return self._stream.update(bytes(count))

    def uniform(self, *shape: int) -> Tensor:
        """Uniform on (0, 1], float64, 53 bits each."""
        bits = np.frombuffer(self.bytes(8 * math.prod(shape)), dtype="<u8") >> 11
        return torch.from_numpy((bits.astype(np.float64) + 1.0) * 2.0**-53).reshape(shape)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, float64 (Box-Muller)."""
        count = math.prod(shape)
        half = (count + 1) // 2
        radius = torch.sqrt(-2.0 * torch.log(self.uniform(half)))
        angle = 2.0 * math.pi * self.uniform(half)
        both = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])
        return both[:count].reshape(shape)

    def permutation(self, count: int) -> list[int]:
        """A uniformly random order of `range(count)`."""
        return torch.argsort(self.uniform(count)).tolist()
