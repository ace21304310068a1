"""Shortlists of candidate tokens with their log probabilities, which attacks pass to each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 256
"""Number of positions that are scored against the whole vocabulary at once."""


@dataclass(frozen=True)
class Shortlist:
    """Holds candidates `ids (N, K)` and their log probabilities `scores (N, K)`, in descending order."""

    ids: Tensor
    scores: Tensor

    @property
    def best(self) -> Tensor:
        """Returns the best candidate of each position, `(N,)`."""
        return self.ids[:, 0]

    @staticmethod
    def of(score: Callable[[slice], Tensor], positions: int, count: int) -> Shortlist:
        """Returns the best `count` tokens of each position.

        Args:
            score: computes unnormalised log probabilities `(n, V)` of a slice of positions.
        """
        ids: list[Tensor] = []
        scores: list[Tensor] = []
        for start in range(0, positions, ROWS):
            logits = score(slice(start, min(start + ROWS, positions))).log_softmax(-1)
            best = logits.topk(min(count, logits.shape[-1]))
            ids.append(best.indices)
            scores.append(best.values)
        return Shortlist(torch.cat(ids), torch.cat(scores))

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scores of `ids (N, K')`, and which of them are listed. The others get the lowest listed score."""
        ordered = self.ids.sort(dim=1)
        index = torch.searchsorted(ordered.values, ids.contiguous()).clamp_max(self.ids.shape[1] - 1)
        listed = ordered.values.gather(1, index) == ids
        scores = self.scores.gather(1, ordered.indices.gather(1, index))
        return torch.where(listed, scores, self.scores[:, -1:]), listed

    def times(self, other: Shortlist, count: int) -> Shortlist:
        """Returns the best `count` tokens of the product of both distributions, which assumes independent evidence."""
        own_scores, repeated = self.find(other.ids)
        ids = torch.cat([self.ids, other.ids], dim=1)
        scores = torch.cat([self.scores + other.find(self.ids)[0], own_scores + other.scores], dim=1)
        duplicate = torch.cat([torch.zeros_like(self.ids, dtype=torch.bool), repeated], dim=1)
        best = scores.masked_fill(duplicate, -torch.inf).log_softmax(-1).topk(min(count, ids.shape[1]))
        return Shortlist(ids.gather(1, best.indices), best.values)
