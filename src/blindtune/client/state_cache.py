"""Keeps the frozen model's hidden states and tangents of texts in memory, and reads and writes the client's store."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from blindtune.client.feature_store import FeatureSource, FeatureStore
from blindtune.models.tokenizer import TokenRow

MAX_BYTES = 2 * 2**30
"""Size in bytes of the states that are kept in memory."""


class StateCache:
    """States of token rows from several sources, in memory; the oldest are dropped."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, TokenRow], Tensor] = OrderedDict()
        self._bytes = 0

    def missing(self, source: FeatureSource, rows: Sequence[TokenRow], store: FeatureStore | None) -> list[TokenRow]:
        """Returns the distinct rows whose states are neither in memory nor in the store, and loads the others."""
        missing = list({row for row in rows if (source.name, row) not in self._known})
        if store is None or not missing:
            return missing
        loaded = store.load(source, missing)
        for row, states in loaded.items():
            self._keep(source, row, states)
        return [row for row in missing if row not in loaded]

    def add(
        self, source: FeatureSource, rows: Sequence[TokenRow], fetched: Sequence[Tensor], store: FeatureStore | None
    ) -> None:
        """Keeps states that an operator sent, in memory and in the store. Several threads may call it."""
        states = [source.rounded(each.clone()) for each in fetched]
        if store is not None:
            store.save(source, rows, states)
        for row, state in zip(rows, states, strict=True):
            self._keep(source, row, state)

    def take(self, source: FeatureSource, rows: Sequence[TokenRow]) -> list[Tensor]:
        """Returns the states of rows, none of which are missing. Drops the oldest states if there are too many."""
        states = [self._known[source.name, row] for row in rows]
        while self._bytes > MAX_BYTES:
            self._bytes -= self._known.popitem(last=False)[1].nbytes
        return states

    def _keep(self, source: FeatureSource, row: TokenRow, states: Tensor) -> None:
        self._known[source.name, row] = states
        self._bytes += states.nbytes
