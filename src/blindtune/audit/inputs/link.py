"""Linking messages: the same text, sent again under fresh noise, can be averaged.

Two copies of one text differ by noise alone, so the mean square of their difference is 2 s² for noise of standard
deviation s, and it is known to 1% from a text's many values. Two other texts differ by more. v copies leave s / √v.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from blindtune.audit.inputs.observe import Exchange, Observed

DEVIATIONS = 3.0
"""Two texts are taken for one if the mean square of their difference is within so many of its standard errors."""
DRIFT = 0.05
"""And so much more, in parts of 2 s²: bottoms move a little between two messages."""


@dataclass(frozen=True)
class Linked:
    """Exchanges with averaged s_A, and how many copies of a text were found, the median over texts."""

    exchanges: list[Exchange]
    copies: float


def link_repeats(exchanges: Sequence[Exchange], deviation: float) -> Linked:
    """Averages s_A over all messages that seem to hold the same text.

    Args:
        deviation: s, of the noise on every value.
    """
    observed = [exchange.read() for exchange in exchanges]
    texts = [
        (number, place, part)
        for number, one in enumerate(observed)
        for place, part in enumerate(one.s_a.split(one.lengths.tolist()))
    ]
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, (_, _, part) in enumerate(texts):
        by_length[len(part)].append(index)
    means: dict[tuple[int, int], Tensor] = {}
    copies: list[int] = []
    for some in by_length.values():
        states = torch.stack([texts[index][2] for index in some])  # (n, L, d)
        flat = states.flatten(1)
        limit = 2 * deviation**2 * (1 + DRIFT + DEVIATIONS * math.sqrt(2 / flat.shape[1]))
        squares = flat.square().sum(1)
        apart = (squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * flat @ flat.T) / flat.shape[1]
        same = apart <= limit
        same.fill_diagonal_(True)
        for row, index in zip(same, some, strict=True):
            number, place, _ = texts[index]
            means[number, place] = states[row].mean(0)
            copies.append(int(row.sum()))
    averaged = [
        replace(one, s_a=torch.cat([means[number, place] for place in range(len(one.lengths))]))
        for number, one in enumerate(observed)
    ]
    found = [replace(exchange, read=_Kept(one)) for exchange, one in zip(exchanges, averaged, strict=True)]
    return Linked(found, median(copies))


@dataclass(frozen=True)
class _Kept:
    observed: Observed

    def __call__(self) -> Observed:
        return self.observed
