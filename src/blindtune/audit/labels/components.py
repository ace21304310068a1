"""The best of the first ten principal components.

Weaker than it looks as an attack, since somebody has to say which component it is, but a few known labels may do
that. A defence that only buries the label below the first component is found out here.
"""

from blindtune.audit.labels.registry import COMPONENTS, Channel, attack
from blindtune.audit.statistics import Labels, Scores


@attack("components", knows="which component")
def components(channel: Channel, labels: Labels) -> Scores:
    return channel.components(COMPONENTS)
