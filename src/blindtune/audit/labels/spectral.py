"""Spectral attack (Sun et al. 2022): the projection on the first right singular vector of the centred features."""

import numpy as np
from scipy.linalg import eigh

from blindtune.audit.labels.registry import attack
from blindtune.audit.observe import Features
from blindtune.audit.statistics import Labels, Scores


@attack("spectral", knows="nothing")
def spectral(features: Features, labels: Labels) -> Scores:
    return principal_components(features, 1)


def principal_components(features: Features, count: int) -> Scores:
    """Coordinates on the leading principal directions: `(N, count)`."""
    centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    size = centred.shape[1]
    count = min(count, size)
    leading = (max(0, size - count), size - 1)
    _, vectors = eigh(centred.T @ centred, subset_by_index=leading)
    return centred @ vectors[:, ::-1]
