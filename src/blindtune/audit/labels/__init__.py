"""Attacks on labels, one file for each. Importing this package registers them."""

from blindtune.audit.labels.adam import invert_adam
from blindtune.audit.labels.bimodal import bimodal
from blindtune.audit.labels.boosting import boosted_trees
from blindtune.audit.labels.components import components
from blindtune.audit.labels.few import few_labels
from blindtune.audit.labels.gram import recombine
from blindtune.audit.labels.inversion import invert_updates
from blindtune.audit.labels.kmeans import kmeans
from blindtune.audit.labels.lattice import audit_shares
from blindtune.audit.labels.logistic import logistic_regression
from blindtune.audit.labels.norm import norm
from blindtune.audit.labels.registry import (
    ATTACKS,
    SHARE_ATTACKS,
    UPDATE_ATTACKS,
    Attack,
    Channel,
    Declaration,
    Knowledge,
    attack,
    catalogue,
)
from blindtune.audit.labels.spectral import spectral
from blindtune.audit.labels.summed import summed

__all__ = [
    "ATTACKS",
    "SHARE_ATTACKS",
    "UPDATE_ATTACKS",
    "Attack",
    "Channel",
    "Declaration",
    "Knowledge",
    "attack",
    "audit_shares",
    "bimodal",
    "boosted_trees",
    "catalogue",
    "components",
    "few_labels",
    "invert_adam",
    "invert_updates",
    "kmeans",
    "logistic_regression",
    "norm",
    "recombine",
    "spectral",
    "summed",
]
