"""Decorrelation (GuardedTuning, after NoPeek, Vepakomma et al. 2020): smashed data that say little about the tokens.

    L = task + λ · dCor(e, s_A)

with e the frozen embeddings of the tokens and s_A what leaves the client. Distances are compared over a sample of
tokens; the bias-corrected estimator (`blindtune.privacy.distance_correlation`) is needed there, since the plain one
reads about 1 for few tokens of many dimensions, whatever they hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blindtune.privacy.distance_correlation import SMALLEST_BATCH, squared_distance_correlation

SAMPLE = 256
SMALLEST = 1e-4
"""Of dCor²: where its square root stops to be differentiable in practice."""


def decorrelation(embeddings: Tensor, smashed: Tensor, generator: torch.Generator, *, sample: int = SAMPLE) -> Tensor:
    """dCor(e, s) over at most `sample` tokens, in [0, 1]; 0 for fewer than four tokens.

    Args:
        embeddings: `(N, e)`, not differentiated.
        smashed: `(N, d)`, differentiable.
        generator: draws the sample.
    """
    count = len(smashed)
    if count < SMALLEST_BATCH:
        return smashed.new_zeros(())
    if count > sample:
        chosen = torch.randperm(count, generator=generator)[:sample]
        embeddings, smashed = embeddings[chosen], smashed[chosen]
    return squared_distance_correlation(smashed, embeddings.detach()).clamp_min(SMALLEST).sqrt()
