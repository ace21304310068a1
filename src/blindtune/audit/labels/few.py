"""Probes that know 16, 64 or 256 labels, drawn at random, and are scored on all other texts.

The attacker has the vectors of all texts. It computes their leading principal components, and fits a logistic
regression on the texts whose labels it knows. With more labels it uses more components. The AUC is the mean over draws.
"""

from functools import partial

import numpy as np
from sklearn.linear_model import LogisticRegression

from blindtune.audit.labels.registry import Channel, Knowledge, attack
from blindtune.audit.solvers import unconverged_fits
from blindtune.audit.statistics import Labels, Scores

DRAWS = 8
MIN_SCORED = 50
"""Minimum number of texts with unknown labels to score on."""


def few_labels(count: int, channel: Channel, labels: Labels) -> Scores | None:
    """Returns class probabilities `(DRAWS, N, K)` from `count` known labels; NaN for texts whose label was known."""
    if len(labels) < count + MIN_SCORED:
        return None
    classes = np.unique(labels)
    features = channel.components(count)
    features = features / max(float(features[:, 0].std()), 1e-30)
    random = np.random.default_rng(count)
    scores = np.full((DRAWS, len(labels), len(classes)), np.nan)
    for draw in scores:
        order = random.permutation(len(labels))
        one_of_each = [order[labels[order] == label][0] for label in classes]  # the fit needs every class
        known = np.array([*one_of_each, *(index for index in order if index not in one_of_each)])[:count]
        probe = LogisticRegression(C=10.0, max_iter=100)
        with unconverged_fits():
            probe.fit(features[known], labels[known])
        draw[:] = probe.predict_proba(features)
        draw[known] = np.nan
    return scores


COUNTS: dict[int, Knowledge] = {16: Knowledge.LABELS_16, 64: Knowledge.LABELS_64, 256: Knowledge.LABELS_256}
for _count, _knows in COUNTS.items():
    attack(f"probe with {_count} labels", knows=_knows, when="last snapshot")(partial(few_labels, _count))
