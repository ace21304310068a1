"""Cross-validated logistic regression with the labels of all other folds: a pessimistic bound, not a real attacker."""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from blindtune.audit.labels.registry import Channel, attack
from blindtune.audit.statistics import Labels, Scores

FOLDS = 4


@attack("logistic regression", knows="all other labels", when="some looks")
def logistic_regression(channel: Channel, labels: Labels) -> Scores | None:
    folds = min(FOLDS, int(np.bincount(labels)[np.unique(labels)].min()))
    if folds < 2:
        return None
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
    splits = StratifiedKFold(folds, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        chances = cross_val_predict(probe, channel.features, labels, cv=splits, method="predict_proba")
    return np.asarray(chances, dtype=np.float64)
