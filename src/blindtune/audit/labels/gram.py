"""Shares of one gradient that met: their quietest combination is the gradient, at every noise level.

All shares but one are independent noise, and the last one is the gradient plus a combination of the others. The
smallest eigenvector of the shares' m × m Gram matrix is that combination, up to a factor. The factor follows from how
shares are made (`blindtune.privacy.shares`, public): the share that carries the gradient has the coefficient 1; all
other coefficients together have a length in [1, 1.25), by which its noise is louder than that of the others. A wrong
carrier can mean a wrong sign, and wrong signs in some batches hide the labels of all. Where noise is weaker than the
gradient, the loudest combination is the gradient. Ours; the idea is blind source separation's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blindtune.audit.labels.registry import observes_shares
from blindtune.audit.observe import Features

LENGTHS = (1.0, 1.25)


@observes_shares("Gram matrix", observes="shares that met", needs=("how shares are made",))
def recombine(shares: Features) -> dict[str, NDArray[np.floating]]:
    """Recovered gradients of m ≥ 2 shares `(m, n, B, d)`: `(B, n d)`, and summed over adapters `(B, d)`."""
    m, n = shares.shape[:2]
    if m < 2:
        return {}
    flat = shares.reshape(m, -1).astype(np.float64)
    _, vectors = np.linalg.eigh(flat @ flat.T)
    channels: dict[str, NDArray[np.floating]] = {}
    quietest, loudest = vectors[:, 0], vectors[:, -1]
    sizes = np.linalg.norm(flat, axis=1)
    carrier, louder = _carrier(quietest, sizes), int(sizes.argmax())
    combinations = {"recombined": quietest / quietest[carrier], "loudest": loudest * np.sign(loudest[louder])}
    for name, combination in combinations.items():
        gradient = np.tensordot(combination, shares.astype(np.float64), axes=1)  # (n, B, d)
        channels[f"gradient {name}"] = np.concatenate(list(gradient), axis=1)
        if n > 1:
            channels[f"gradient {name}, summed"] = gradient.sum(0)
    return channels


def _carrier(vector: NDArray[np.float64], sizes: NDArray[np.float64]) -> int:
    """Which share carries the gradient.

    The length of all other coefficients, in units of its own, is in `LENGTHS`, and is how loud it is beside the others.
    """
    others = np.sqrt(np.maximum(1.0 - vector**2, 0.0)) / np.maximum(np.abs(vector), 1e-12)
    beside = np.sqrt((np.sum(sizes**2) - sizes**2) / (len(sizes) - 1))
    outside = np.maximum(np.maximum(LENGTHS[0] - others, others - LENGTHS[1]), 0.0)
    return int((outside + np.abs(sizes / np.maximum(beside, 1e-300) - others)).argmin())
