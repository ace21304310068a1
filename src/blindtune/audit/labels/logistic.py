"""Cross-validated logistic regression that knows the labels of all other folds.

It is an upper bound for attackers with less knowledge; no real attacker knows so many labels.
"""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from blindtune.audit.labels.registry import Channel, Knowledge, attack
from blindtune.audit.solvers import unconverged_fits
from blindtune.audit.statistics import Labels, Scores

FOLDS = 4


@attack("logistic regression", knows=Knowledge.ALL_OTHER_LABELS, when="some snapshots")
def logistic_regression(channel: Channel, labels: Labels) -> Scores | None:
    folds = min(FOLDS, int(np.bincount(labels)[np.unique(labels)].min()))
    if folds < 2:
        return None
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
    splits = StratifiedKFold(folds, shuffle=True, random_state=0)
    with unconverged_fits():
        probabilities = cross_val_predict(probe, channel.features, labels, cv=splits, method="predict_proba")
    return np.asarray(probabilities, dtype=np.float64)
