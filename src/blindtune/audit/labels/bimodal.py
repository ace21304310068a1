"""The most bimodal of the first ten principal components.

Classes make a component's distribution two-humped (low kurtosis). This picks the component without any label, where a
defence has only pushed the label below the first one.
"""

import numpy as np

from blindtune.audit.labels.registry import COMPONENTS, Channel, attack
from blindtune.audit.statistics import Labels, Scores


@attack("bimodal component", knows="nothing")
def bimodal(channel: Channel, labels: Labels) -> Scores:
    scores = channel.components(COMPONENTS)
    spread = scores.std(0)
    standard = scores / np.where(spread > 0, spread, 1.0)
    kurtosis = (standard**4).mean(0) + np.where(spread > 1e-6 * spread.max(), 0.0, np.inf)
    return scores[:, [int(kurtosis.argmin())]]
