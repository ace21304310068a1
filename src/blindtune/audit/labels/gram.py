"""Recombines the shares of one gradient: the combination with the least energy is the gradient, at any noise level.

All shares but one are independent noise, and the last one is the gradient plus a combination of the others. The
eigenvector of the shares' m × m Gram matrix with the smallest eigenvalue is that combination, up to a factor. The
factor follows from how shares are made (`blindtune.privacy.shares`, public): the share that carries the gradient has
the coefficient 1; the vector of all other coefficients has a length in [1, 1.25), and the noise of the carrier is
larger than that of the others by this factor. If the attack takes a wrong share for the carrier, the sign of the
gradient may be wrong; wrong signs in some batches hide the labels of all batches. If the noise is weaker than the
gradient, the combination with the most energy is the gradient. The attack is ours; it applies blind source separation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blindtune.audit.channel_id import RECOMBINED, SUMMED, ChannelId, ChannelKind
from blindtune.audit.labels.registry import observes_shares
from blindtune.audit.observe import Features

LENGTHS = (1.0, 1.25)
LOUDEST = "loudest"


@observes_shares("Gram matrix", observes="shares that met", needs=("how shares are made",))
def recombine(shares: Features) -> dict[ChannelId, NDArray[np.floating]]:
    """Recovers gradients from m ≥ 2 shares `(m, n, B, d)`: `(B, n d)`, and their sums over adapters `(B, d)`."""
    m, n = shares.shape[:2]
    if m < 2:
        return {}
    flat = shares.reshape(m, -1).astype(np.float64)
    _, vectors = np.linalg.eigh(flat @ flat.T)
    channels: dict[ChannelId, NDArray[np.floating]] = {}
    quietest, loudest = vectors[:, 0], vectors[:, -1]
    sizes = np.linalg.norm(flat, axis=1)
    carrier, loudest_share = _carrier(quietest, sizes), int(sizes.argmax())
    combinations = {RECOMBINED: quietest / quietest[carrier], LOUDEST: loudest * np.sign(loudest[loudest_share])}
    for modifier, combination in combinations.items():
        gradient = np.tensordot(combination, shares.astype(np.float64), axes=1)  # (n, B, d)
        channels[ChannelId(ChannelKind.GRADIENT, modifier=modifier)] = np.concatenate(list(gradient), axis=1)
        if n > 1:
            channels[ChannelId(ChannelKind.GRADIENT, modifier=f"{modifier}, {SUMMED}")] = gradient.sum(0)
    return channels


def _carrier(vector: NDArray[np.float64], sizes: NDArray[np.float64]) -> int:
    """Returns the index of the share that carries the gradient.

    For this share, the length of all other coefficients divided by its own coefficient is in `LENGTHS`, and equals the
    ratio of its size to the size of the others.
    """
    others = np.sqrt(np.maximum(1.0 - vector**2, 0.0)) / np.maximum(np.abs(vector), 1e-12)
    other_sizes = np.sqrt((np.sum(sizes**2) - sizes**2) / (len(sizes) - 1))
    outside = np.maximum(np.maximum(LENGTHS[0] - others, others - LENGTHS[1]), 0.0)
    return int((outside + np.abs(sizes / np.maximum(other_sizes, 1e-300) - others)).argmin())
