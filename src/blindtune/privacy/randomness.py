"""Cryptographic randomness for secrets: a ChaCha20 keystream, by default with a key from the operating system."""

from __future__ import annotations

import hashlib
import hmac
import os

import torch
from torch import Tensor

from blindtune.keystream import KEY_BYTES, Keystream


class SecureGenerator(Keystream):
    """A stream of secret random numbers that an operator can't predict.

    Args:
        key: 32 bytes that determine the stream, so that a resumed run can repeat it; as secret as the labels. Default:
            random bytes from the operating system.
    Raises:
        ValueError: the key isn't 32 bytes long.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self.key = os.urandom(KEY_BYTES) if key is None else key
        super().__init__(self.key)

    def derive(self, *context: bytes) -> SecureGenerator:
        """Returns a generator whose key is the HMAC-SHA-256 of the context under this generator's key.

        Equal contexts give equal streams; different contexts give independent streams.
        """
        digest = hmac.new(self.key, digestmod=hashlib.sha256)
        for part in context:
            digest.update(len(part).to_bytes(8, "little") + part)
        return SecureGenerator(digest.digest())

    def bound_to(self, values: Tensor) -> SecureGenerator:
        """Returns a generator derived from these values, so that the noise that hides them is never reused for others.

        Equal values of equal dtype and shape give equal streams.
        """
        content = values.detach().contiguous().cpu()
        shape = repr((content.dtype, tuple(content.shape))).encode()
        return self.derive(b"bound to", shape, hashlib.sha256(content.numpy().tobytes()).digest())

    def permutation(self, count: int) -> list[int]:
        """Returns a uniformly random permutation of `range(count)`."""
        return torch.argsort(self.uniform(count)).tolist()
