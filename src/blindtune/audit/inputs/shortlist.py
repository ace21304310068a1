"""A few candidate tokens for each position with their log probabilities: what attacks hand to each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 256
"""Positions that are scored against the whole vocabulary at once."""


@dataclass(frozen=True)
class Shortlist:
    """`ids (N, K)` and their log probabilities `scores (N, K)`, the best first."""

    ids: Tensor
    scores: Tensor

    @property
    def best(self) -> Tensor:
        return self.ids[:, 0]

    @staticmethod
    def of(score: Callable[[slice], Tensor], positions: int, count: int) -> Shortlist:
        """The best `count` of the vocabulary, from unnormalised log probabilities `(n, V)` of a slice of positions."""
        ids: list[Tensor] = []
        scores: list[Tensor] = []
        for start in range(0, positions, ROWS):
            logits = score(slice(start, min(start + ROWS, positions))).log_softmax(-1)
            best = logits.topk(min(count, logits.shape[-1]))
            ids.append(best.indices)
            scores.append(best.values)
        return Shortlist(torch.cat(ids), torch.cat(scores))

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of `ids (N, K')`, and which of them are listed; those that aren't count like the worst that is."""
        ordered = self.ids.sort(dim=1)
        place = torch.searchsorted(ordered.values, ids.contiguous()).clamp_max(self.ids.shape[1] - 1)
        listed = ordered.values.gather(1, place) == ids
        scores = self.scores.gather(1, ordered.indices.gather(1, place))
        return torch.where(listed, scores, self.scores[:, -1:]), listed

    def times(self, other: Shortlist, count: int) -> Shortlist:
        """The product of both distributions (evidence that is independent given the token), best `count`."""
        theirs, repeated = self.find(other.ids)
        ids = torch.cat([self.ids, other.ids], dim=1)
        scores = torch.cat([self.scores + other.find(self.ids)[0], theirs + other.scores], dim=1)
        once = torch.cat([torch.zeros_like(self.ids, dtype=torch.bool), repeated], dim=1)
        best = scores.masked_fill(once, -torch.inf).log_softmax(-1).topk(min(count, ids.shape[1]))
        return Shortlist(ids.gather(1, best.indices), best.values)
