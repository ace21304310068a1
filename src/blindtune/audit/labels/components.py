"""The best of the first ten principal components.

Weaker than it looks as an attack, since somebody has to say which component it is, but a few known labels may do
that. A defence that only buries the label below the first component is found out here.
"""

from blindtune.audit.labels.registry import attack
from blindtune.audit.labels.spectral import principal_components
from blindtune.audit.observe import Features
from blindtune.audit.statistics import Labels, Scores

COMPONENTS = 10


@attack("components", knows="which component")
def components(features: Features, labels: Labels) -> Scores:
    return principal_components(features, COMPONENTS)
