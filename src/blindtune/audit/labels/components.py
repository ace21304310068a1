"""Each of the first ten principal components; the best one counts.

The attacker has to know which component separates the classes. A few known labels can be enough for that. The attack
succeeds against defences that move the label out of the first component only.
"""

from blindtune.audit.labels.registry import COMPONENTS, Channel, Knowledge, attack
from blindtune.audit.statistics import Labels, Scores


@attack("components", knows=Knowledge.WHICH_COMPONENT)
def components(channel: Channel, labels: Labels) -> Scores:
    return channel.components(COMPONENTS)
