"""Attacks on labels: one file each. Importing this package fills the registry."""

from blindtune.audit.labels.bimodal import bimodal
from blindtune.audit.labels.components import components
from blindtune.audit.labels.kmeans import kmeans
from blindtune.audit.labels.logistic import logistic_regression
from blindtune.audit.labels.norm import norm
from blindtune.audit.labels.registry import ATTACKS, Attack, attack
from blindtune.audit.labels.spectral import principal_components, spectral

__all__ = [
    "ATTACKS",
    "Attack",
    "attack",
    "bimodal",
    "components",
    "kmeans",
    "logistic_regression",
    "norm",
    "principal_components",
    "spectral",
]
