"""k-means with one cluster for each class.

The score of a class is the distance to the nearest other cluster minus the distance to the cluster of that class.
"""

import numpy as np
from sklearn.cluster import KMeans

from blindtune.audit.labels.registry import Channel, Knowledge, attack
from blindtune.audit.statistics import Labels, Scores


@attack("k-means", knows=Knowledge.NOTHING)
def kmeans(channel: Channel, labels: Labels) -> Scores:
    clusters, features = channel.classes, channel.features
    scale = float(features.std()) or 1.0
    model = KMeans(clusters, n_init=3, max_iter=50, random_state=0)  # pyright: ignore[reportArgumentType]
    model.fit(features / scale)
    distances = model.transform(features / scale).astype(np.float64)  # (N, clusters)
    if clusters == 2:
        return distances[:, :1] - distances[:, 1:]
    others = np.stack([np.delete(distances, j, axis=1).min(1) for j in range(clusters)], axis=1)
    return others - distances
