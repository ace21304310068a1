"""How shares and noisy rows were made before noise lay on a lattice, kept as it was, and how they are made now."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from blindtune.keystream import Keystream
from blindtune.lattice import Lattice
from blindtune.privacy.randomness import SecureGenerator
from blindtune.privacy.shares import split_gradient
from blindtune.privacy.token_noise import clip_rows

Array = NDArray[np.floating]


def generator(*context: object) -> SecureGenerator:
    return SecureGenerator(bytes(range(32))).derive(*(str(part).encode() for part in context))


def old_noise(seed: bytes, shape: tuple[int, ...], sigma: float) -> torch.Tensor:
    return (sigma * Keystream(seed).normal(*shape)).float()


def old_split(gradient: Array, sigma: float, key: SecureGenerator, length: float | None = None) -> tuple[Array, float]:
    """Carrier and coefficient of two shares: (fl32(g - α n), α). The other share is n, in float32.

    Args:
        length: |α|; drawn in [1, 1.25), as it was, if it isn't given.
    """
    direction = key.normal(1)
    drawn = float(1.0 + 0.25 * (1.0 - key.uniform(1)))
    alpha = float(direction / direction.norm()) * (drawn if length is None else length)
    noise = old_noise(key.bytes(32), gradient.shape, sigma)
    return (torch.from_numpy(gradient).double() - alpha * noise.double()).float().numpy(), alpha


def old_token_noise(rows: Array, clip_norm: float, noise: float, key: SecureGenerator) -> Array:
    smashed = torch.from_numpy(rows).float()
    return (clip_rows(smashed, clip_norm) + noise * clip_norm * key.normal(*smashed.shape).to(smashed)).numpy()


def new_split(gradient: Array, sigma: float, key: SecureGenerator, m: int = 2) -> tuple[Array, Array, Array]:
    """(carrier, the other shares `(m - 1, ...)`, the gradient as it was rounded) of the package's own shares."""
    lattice = Lattice.for_sigma(sigma, terms=m - 1)
    points = lattice.round(torch.from_numpy(gradient), key)
    split = split_gradient(points, m, lattice, generator=key)
    others = [index for index in range(m) if index != split.carrier]
    return split.shares[split.carrier].numpy(), split.shares[others].numpy(), points.double().numpy() * lattice.step


def new_split_of_known(
    hypotheses: Array, sent: NDArray, sigma: float, key: SecureGenerator, largest: float = 0.0
) -> tuple[Array, Array, Lattice]:
    """(carrier, all hypotheses as they are rounded, the lattice): an attacker knows how each would be rounded."""
    lattice = Lattice.for_sigma(sigma, largest=largest)
    points = lattice.round(torch.from_numpy(hypotheses), key)
    split = split_gradient(points[torch.arange(len(sent)), torch.from_numpy(sent)], 2, lattice, generator=key)
    return split.shares[split.carrier].numpy(), points.double().numpy() * lattice.step, lattice
