"""What each step sees, and how fast it learns: functions of the step (and the seed), so that runs can be resumed.

Examples are shuffled anew every epoch, into batches of similar length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

BUCKET_BATCHES = 8
"""Batches that are sorted by length together: padding shrinks, and the order stays random enough."""


@dataclass
class BatchPlan:
    """Batches of example indices for any step; no state, so a resumed run sees what an uninterrupted one sees.

    Args:
        lengths: tokens of each example.
    """

    lengths: Sequence[int]
    batch_size: int
    seed: int
    _epochs: dict[int, list[list[int]]] = field(default_factory=dict[int, list[list[int]]], repr=False)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def batch(self, step: int) -> list[int]:
        """Indices for step 0, 1, …; every example once in each epoch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch not in self._epochs:
            self._epochs = {epoch: self._shuffle(epoch)}
        return self._epochs[epoch][position]

    def _shuffle(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        lengths = np.asarray(self.lengths)
        bucket = self.batch_size * BUCKET_BATCHES
        batches: list[list[int]] = []
        for start in range(0, len(order), bucket):
            part = order[start : start + bucket]
            part = part[np.argsort(lengths[part], kind="stable")]
            batches += [part[i : i + self.batch_size].tolist() for i in range(0, len(part), self.batch_size)]
        last = [batch for batch in batches if len(batch) < self.batch_size]  # the short one comes last
        full = [batch for batch in batches if len(batch) == self.batch_size]
        return [full[i] for i in rng.permutation(len(full))] + last


def linear_rate(step: int, steps: int, warmup: int, floor: float) -> float:
    """The factor on learning rates at step 0, 1, …: rises over `warmup` steps while it falls linearly to `floor`."""
    return min(1.0, (step + 1) / max(1, warmup)) * max(floor, 1 - step / steps)
