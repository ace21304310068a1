"""The most bimodal of the first ten principal components.

If the classes separate along a component, its distribution has two modes, and therefore a low kurtosis. The attack
chooses the component with the lowest kurtosis, without any label. It succeeds against defences that move the label out
of the first component only.
"""

import numpy as np

from blindtune.audit.labels.registry import COMPONENTS, Channel, Knowledge, attack
from blindtune.audit.statistics import Labels, Scores


@attack("bimodal component", knows=Knowledge.NOTHING)
def bimodal(channel: Channel, labels: Labels) -> Scores:
    scores = channel.components(COMPONENTS)
    spread = scores.std(0)
    standard = scores / np.where(spread > 0, spread, 1.0)
    kurtosis = (standard**4).mean(0) + np.where(spread > 1e-6 * spread.max(), 0.0, np.inf)
    return scores[:, [int(kurtosis.argmin())]]
