"""Boosted trees on received gradients (P3EFT, section 4): fitted on some texts, scored on the others.

The attack uses XGBoost, as the paper does, if it is installed (`pip install blindtune[xgboost]`). Otherwise it uses
scikit-learn's histogram gradient boosting, and is registered under that name. It fits the trees on three quarters of
the texts with their labels. If shares are noise, the trees fit these texts perfectly, and their scores on the remaining
quarter are random.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import train_test_split

from blindtune.audit.channel_id import ChannelKind
from blindtune.audit.labels.registry import Channel, Knowledge, attack
from blindtune.audit.statistics import Labels, Scores

XGBOOST = importlib.util.find_spec("xgboost") is not None
NAME = "XGBoost" if XGBOOST else "histogram gradient boosting"
ROUNDS, DEPTH = 60, 4
FEWEST = 100
HELD_OUT = 0.25
"""Fraction of the texts that the trees are scored on."""


def classifier() -> Any:
    """Returns an unfitted model with scikit-learn's interface."""
    if XGBOOST:
        import xgboost  # pyright: ignore[reportMissingImports]

        return xgboost.XGBClassifier(n_estimators=ROUNDS, max_depth=DEPTH, random_state=0, n_jobs=1)
    model: Any = HistGradientBoostingClassifier(max_iter=ROUNDS, max_depth=DEPTH, max_bins=63, random_state=0)
    return model.set_params(early_stopping=False)


@attack(
    NAME,
    knows=Knowledge.ALL_OTHER_LABELS,
    kinds=(ChannelKind.GRADIENT,),
    when="last snapshot",
    observes="one gradient channel",
)
def boosted_trees(channel: Channel, labels: Labels) -> Scores | None:
    """Returns class probabilities `(1, N, K)` of the held-out texts; NaN for those that the trees were fitted on."""
    classes, coded = np.unique(labels, return_inverse=True)
    if len(labels) < FEWEST or int(np.bincount(coded).min()) < 2:
        return None
    known, held = train_test_split(np.arange(len(labels)), test_size=HELD_OUT, stratify=coded, random_state=0)[:2]
    model = classifier().fit(channel.features[known], coded[known])
    scores = np.full((1, len(labels), len(classes)), np.nan)
    scores[0, held] = model.predict_proba(channel.features[held])
    return scores
