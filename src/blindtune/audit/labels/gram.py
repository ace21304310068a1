"""Shares of one gradient that met: their quietest combination is the gradient, at every noise level.

All shares but one are independent noise, and the last one is the gradient plus a combination of the others. The
smallest eigenvector of the shares' m × m Gram matrix is that combination, up to a factor. The factor follows from how
shares are made (`blindtune.privacy.shares`, public): the share that carries the gradient has the coefficient 1, all
others together have a length in [1, 1.25). Where noise is weaker than the gradient, the loudest combination is the
gradient. Ours; the idea is blind source separation's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blindtune.audit.labels.registry import observes_shares
from blindtune.audit.observe import Features

LENGTHS = (1.0, 1.25)


@observes_shares("Gram matrix")
def recombine(shares: Features) -> dict[str, NDArray[np.floating]]:
    """Recovered gradients of m ≥ 2 shares `(m, n, B, d)`: `(B, n d)`, and summed over adapters `(B, d)`."""
    m, n = shares.shape[:2]
    if m < 2:
        return {}
    flat = shares.reshape(m, -1).astype(np.float64)
    _, vectors = np.linalg.eigh(flat @ flat.T)
    channels: dict[str, NDArray[np.floating]] = {}
    for name, combination in (("recombined", _scaled(vectors[:, 0])), ("loudest", _upright(vectors[:, -1]))):
        gradient = np.tensordot(combination, shares.astype(np.float64), axes=1)  # (n, B, d)
        channels[f"gradient {name}"] = np.concatenate(list(gradient), axis=1)
        if n > 1:
            channels[f"gradient {name}, summed"] = gradient.sum(0)
    return channels


def _scaled(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divided by the entry for which the others' length comes nearest to `LENGTHS`: the carrier's."""
    others = np.sqrt(np.maximum(1.0 - vector**2, 0.0)) / np.maximum(np.abs(vector), 1e-12)
    distance = np.maximum(np.maximum(LENGTHS[0] - others, others - LENGTHS[1]), 0.0)
    return vector / vector[int(distance.argmin())]


def _upright(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """With its largest entry positive."""
    return vector * np.sign(vector[int(np.abs(vector).argmax())])
