"""Norm attack (Li et al. 2022): gradients and shifts of one class tend to be longer than the other's."""

import numpy as np

from blindtune.audit.labels.registry import Channel, attack
from blindtune.audit.statistics import Labels, Scores


@attack("norm", knows="nothing")
def norm(channel: Channel, labels: Labels) -> Scores:
    return np.linalg.norm(channel.features.astype(np.float64), axis=1, keepdims=True)
