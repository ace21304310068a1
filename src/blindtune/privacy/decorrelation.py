"""Decorrelation of smashed data from tokens (GuardedTuning, after NoPeek, Vepakomma et al. 2020).

    L = task + λ · dCor(e, s_A)

where e are the frozen embeddings of the tokens and s_A the smashed data: the hidden states that leave the client. The
distance correlation is estimated on a sample of tokens. This needs the bias-corrected estimator
(`blindtune.privacy.distance_correlation`): for few tokens of many dimensions the plain one is about 1 for any values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blindtune.privacy.distance_correlation import SMALLEST_BATCH, squared_distance_correlation

SAMPLE = 256
"""Default number of sampled tokens."""
SMALLEST = 1e-4
"""Lower bound on dCor², below which the gradient of its square root becomes too large."""


def decorrelation(embeddings: Tensor, smashed: Tensor, generator: torch.Generator, *, sample: int = SAMPLE) -> Tensor:
    """Returns the estimated dCor(e, s) over at most `sample` tokens, in [0, 1]; 0 for fewer than four tokens.

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
