"""The examples of each training step, as a function of step and seed, so that runs can be resumed.

Examples are shuffled anew in every epoch and divided into batches of similar length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

BUCKET_BATCHES = 8
"""Number of batches whose examples are sorted by length together, which reduces padding but keeps batches random."""


@dataclass
class BatchPlan:
    """The batch of example indices for each step. A resumed run gets the same batches as an uninterrupted one.

    Args:
        lengths: number of tokens of each example.
        batch_size: number of examples in a batch; the last batch of an epoch may have fewer.
        seed: seed of the shuffling.
    """

    lengths: Sequence[int]
    batch_size: int
    seed: int
    _epochs: dict[int, list[list[int]]] = field(default_factory=dict[int, list[list[int]]], repr=False)

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def batch(self, step: int) -> list[int]:
        """Returns the example indices of step 0, 1, … Each epoch has every example once."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch not in self._epochs:
            self._epochs = {epoch: self._shuffle(epoch)}
        return self._epochs[epoch][position]

    def _shuffle(self, epoch: int) -> list[list[int]]:
        """Returns the batches of an epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        lengths = np.asarray(self.lengths)
        bucket = self.batch_size * BUCKET_BATCHES
        batches: list[list[int]] = []
        for start in range(0, len(order), bucket):
            part = order[start : start + bucket]
            part = part[np.argsort(lengths[part], kind="stable")]
            batches += [part[i : i + self.batch_size].tolist() for i in range(0, len(part), self.batch_size)]
        last = [batch for batch in batches if len(batch) < self.batch_size]  # the incomplete batch stays last
        full = [batch for batch in batches if len(batch) == self.batch_size]
        return [full[i] for i in rng.permutation(len(full))] + last
