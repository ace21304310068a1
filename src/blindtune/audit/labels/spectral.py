"""Spectral attack (Sun et al. 2022): the projection on the first right singular vector of the centred features."""

from blindtune.audit.labels.registry import Channel, attack
from blindtune.audit.statistics import Labels, Scores


@attack("spectral", knows="nothing")
def spectral(channel: Channel, labels: Labels) -> Scores:
    return channel.components(1)
