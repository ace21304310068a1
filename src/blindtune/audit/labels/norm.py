"""Norm attack (Li et al. 2022): gradients and shifts of one class are often longer than those of the other class."""

import numpy as np

from blindtune.audit.labels.registry import Channel, Knowledge, attack
from blindtune.audit.statistics import Labels, Scores


@attack("norm", knows=Knowledge.NOTHING)
def norm(channel: Channel, labels: Labels) -> Scores:
    return np.linalg.norm(channel.features.astype(np.float64), axis=1, keepdims=True)
