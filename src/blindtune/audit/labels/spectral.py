"""Spectral attack (Sun et al. 2022): projects the centred features onto their first right singular vector."""

from blindtune.audit.labels.registry import Channel, Knowledge, attack
from blindtune.audit.statistics import Labels, Scores


@attack("spectral", knows=Knowledge.NOTHING)
def spectral(channel: Channel, labels: Labels) -> Scores:
    return channel.components(1)
