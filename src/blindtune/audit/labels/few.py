"""Probes that are given 16, 64 or 256 labels, drawn at random, and scored on all other texts: an insider's friend.

The attacker has the vectors of all texts, so it first takes their leading principal components, and then fits a
logistic regression on the few that it knows. More labels support more components. AUC is the mean over the draws.
"""

import warnings
from functools import partial

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from blindtune.audit.labels.registry import Channel, Knowledge, attack
from blindtune.audit.statistics import Labels, Scores

DRAWS = 8
LEFT = 50
"""Texts that must remain to be scored on."""


def few_labels(count: int, channel: Channel, labels: Labels) -> Scores | None:
    """Class probabilities from `count` known labels: `(DRAWS, N, K)`, NaN where the label was known."""
    if len(labels) < count + LEFT:
        return None
    classes = np.unique(labels)
    features = channel.components(count)
    features = features / max(float(features[:, 0].std()), 1e-30)
    random = np.random.default_rng(count)
    scores = np.full((DRAWS, len(labels), len(classes)), np.nan)
    for draw in scores:
        order = random.permutation(len(labels))
        first = [order[labels[order] == label][0] for label in classes]  # a fit needs every class once
        known = np.array([*first, *(index for index in order if index not in first)])[:count]
        probe = LogisticRegression(C=10.0, max_iter=100)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            probe.fit(features[known], labels[known])
        draw[:] = probe.predict_proba(features)
        draw[known] = np.nan
    return scores


COUNTS: dict[int, Knowledge] = {16: "16 labels", 64: "64 labels", 256: "256 labels"}
for _count, _knows in COUNTS.items():
    attack(f"probe with {_count} labels", knows=_knows, when="last look")(partial(few_labels, _count))
