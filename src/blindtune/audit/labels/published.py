"""The privacy measures of P3EFT (section 4.2), as the authors compute them: on one set of vectors, with all labels.

The audit's attacks differ: they observe every channel at several moments, and know few labels or none.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from blindtune.audit.labels.registry import Channel
from blindtune.audit.observe import Features
from blindtune.audit.solvers import unconverged_fits
from blindtune.audit.statistics import Labels, best_auc

FOLDS, ITERATIONS = 3, 150
"""Of the cross-validated logistic regression, as in the authors' code."""
PUBLISHED = ("spectral", "norm", "k-means accuracy", "logistic regression")
"""Names of the measures, in the paper's order."""


def published_measures(features: Features, labels: Labels) -> dict[str, float]:
    """Returns the paper's measures of how much vectors reveal about labels.

    - `spectral`: AUC of the projection onto the first right singular vector of the centred vectors.
    - `norm`: AUC of the norm.
    - `k-means accuracy`: accuracy of clusters under the best matching with classes.
    - `logistic regression`: mean accuracy over three folds, on raw vectors with C = 1.

    AUCs are at least 0.5, since the attacker may swap the classes; with more than two, it is the best class's.

    Args:
        features: `(N, d)`, for example the activations of one adapter.
        labels: `(N,)`, each class at least three times.
    """
    classes, labels = np.unique(labels, return_inverse=True)
    norms = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    scores = {"spectral": Channel(features).components(1), "norm": norms}
    found = {name: best_auc(values, labels, symmetric=True)[0] for name, values in scores.items()}
    found["k-means accuracy"] = _clustering_accuracy(features, labels, len(classes))
    with unconverged_fits():
        fit = LogisticRegression(max_iter=ITERATIONS)
        found["logistic regression"] = float(np.mean(cross_val_score(fit, features, labels, cv=FOLDS)))
    return found


def worst_adapter(hidden: Features, labels: Labels) -> dict[str, float]:
    """Returns each of the paper's measures for the adapter that reveals most.

    Args:
        hidden: `(n, N, d)`.
        labels: `(N,)`.
    """
    each = [published_measures(vectors, labels) for vectors in hidden]
    return {name: max(measures[name] for measures in each) for name in PUBLISHED}


def _clustering_accuracy(features: Features, labels: Labels, clusters: int) -> float:
    model = KMeans(clusters, n_init=10, random_state=0)  # pyright: ignore[reportArgumentType]
    found = model.fit_predict(features)
    counts = np.zeros((clusters, clusters))
    np.add.at(counts, (found, labels), 1)
    rows, columns = linear_sum_assignment(-counts)
    return float(counts[rows, columns].sum() / len(labels))
