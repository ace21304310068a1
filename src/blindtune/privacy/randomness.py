"""Randomness that an honest-but-curious server can't predict: a ChaCha20 keystream, keyed by the operating system."""

from __future__ import annotations

import hashlib
import hmac
import os

import torch
from torch import Tensor

from blindtune.keystream import KEY_BYTES, Keystream


class SecureGenerator(Keystream):
    """A stream of secret random numbers. Without a key it takes one from the operating system.

    A given key makes the stream repeatable, which a resumed run needs; keep such a key as secret as the labels.

    Raises:
        ValueError: a key that isn't 32 bytes long.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self.key = os.urandom(KEY_BYTES) if key is None else key
        super().__init__(self.key)

    def derive(self, *context: bytes) -> SecureGenerator:
        """An independent generator for this context: HMAC-SHA-256 of the context under the key.

        Equal contexts give equal streams, different contexts independent ones.
        """
        digest = hmac.new(self.key, digestmod=hashlib.sha256)
        for part in context:
            digest.update(len(part).to_bytes(8, "little") + part)
        return SecureGenerator(digest.digest())

    def bound_to(self, values: Tensor) -> SecureGenerator:
        """An independent generator for these values: noise that hides them is never used for others."""
        content = values.detach().contiguous().cpu()
        shape = repr((content.dtype, tuple(content.shape))).encode()
        return self.derive(b"bound to", shape, hashlib.sha256(content.numpy().tobytes()).digest())

    def permutation(self, count: int) -> list[int]:
        """A uniformly random order of `range(count)`."""
        return torch.argsort(self.uniform(count)).tolist()
