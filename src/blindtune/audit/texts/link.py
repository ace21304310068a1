"""Links messages of the same text that were sent under fresh noise, and averages them.

Two copies of one text differ by noise only. So the mean square of their difference is 2 s² for noise of standard
deviation s; a text has so many values that the estimate is accurate to about 1%. Two different texts differ by more.
The average of v copies has noise of standard deviation s / √v.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from blindtune.audit.texts.observe import Exchange, Observed

DEVIATIONS = 3.0
"""Number of standard errors by which the mean square difference of two copies of a text may exceed 2 s²."""
DRIFT = 0.05
"""Additional tolerance, as a fraction of 2 s², because the client's bottom changes a little between two messages."""


@dataclass(frozen=True)
class Linked:
    """Holds exchanges with averaged s_A, and the number of copies of a text, as a median over texts."""

    exchanges: list[Exchange]
    copies: float


def link_repeats(exchanges: Sequence[Exchange], deviation: float) -> Linked:
    """Averages s_A over all messages that hold the same text.

    Args:
        deviation: s, the standard deviation of the noise on every value.
    """
    observed = [exchange.read() for exchange in exchanges]
    texts = [
        (number, index, states)
        for number, exchange in enumerate(observed)
        for index, states in enumerate(exchange.s_a.split(exchange.lengths.tolist()))
    ]
    by_length: dict[int, list[tuple[int, int, Tensor]]] = defaultdict(list)
    for text in texts:
        by_length[len(text[2])].append(text)
    means: dict[tuple[int, int], Tensor] = {}
    copies: list[int] = []
    for same_length in by_length.values():
        states = torch.stack([of_text for _, _, of_text in same_length])  # (n, L, d)
        flat = states.flatten(1)
        limit = 2 * deviation**2 * (1 + DRIFT + DEVIATIONS * math.sqrt(2 / flat.shape[1]))
        squares = flat.square().sum(1)
        apart = (squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * flat @ flat.T) / flat.shape[1]
        same = apart <= limit
        same.fill_diagonal_(True)
        for row, (number, index, _) in zip(same, same_length, strict=True):
            means[number, index] = states[row].mean(0)
            copies.append(int(row.sum()))
    averaged: list[Exchange] = []
    for number, (exchange, tensors) in enumerate(zip(exchanges, observed, strict=True)):
        s_a = torch.cat([means[number, index] for index in range(len(tensors.lengths))])
        averaged.append(replace(exchange, read=_reader_of(replace(tensors, s_a=s_a))))
    return Linked(averaged, median(copies))


def _reader_of(observed: Observed) -> Callable[[], Observed]:
    return lambda: observed
