"""The most bimodal of the first ten principal components.

Classes make a component's distribution two-humped (low kurtosis). This picks the component without any label, where a
defence has only pushed the label below the first one.
"""

import numpy as np

from blindtune.audit.labels.registry import attack
from blindtune.audit.labels.spectral import principal_components
from blindtune.audit.observe import Features
from blindtune.audit.statistics import Labels, Scores

COMPONENTS = 10


@attack("bimodal component", knows="nothing")
def bimodal(features: Features, labels: Labels) -> Scores:
    scores = principal_components(features, COMPONENTS)
    spread = scores.std(0)
    standard = scores / np.where(spread > 0, spread, 1.0)
    kurtosis = (standard**4).mean(0) + np.where(spread > 1e-6 * spread.max(), 0.0, np.inf)
    return scores[:, [int(kurtosis.argmin())]]
