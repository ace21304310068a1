"""Reading texts token by token, and asking what would follow: a decoder whose keys and values are kept.

With them one more token costs one token, whatever came before. A bottom is a decoder too, of a few blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from blindtune.models.split import decoder_of


class Reader:
    """A decoder that has read some tokens of B texts and remembers keys and values.

    Args:
        sent: what is read in the place of tokens.
    """

    def __init__(self, causal: nn.Module, sent: Callable[[Tensor], Tensor] = lambda ids: ids) -> None:
        self._decoder, self._cache, self._sent = decoder_of(causal), DynamicCache(), sent

    def read(self, tokens: Tensor) -> Tensor:
        """Hidden states `(B, d)` of one more token for each text."""
        return self._run(tokens, self._cache)

    def imagine(self, candidates: Tensor) -> Tensor:
        """Hidden states `(B, K, d)`, if `candidates (B, K)` came next."""
        count, width = candidates.shape
        cache = copy.deepcopy(self._cache)
        if cache.get_seq_length():
            cache.batch_repeat_interleave(width)
        return self._run(candidates.flatten(), cache).reshape(count, width, -1)

    def keep(self, count: int) -> None:
        """Forgets all texts but the first."""
        if self._cache.get_seq_length():
            self._cache.batch_select_indices(torch.arange(count))

    def _run(self, tokens: Tensor, cache: DynamicCache) -> Tensor:
        length = cache.get_seq_length() + 1
        mask = torch.ones(len(tokens), length, dtype=torch.long, device=tokens.device)
        output = self._decoder(
            input_ids=self._sent(tokens).unsqueeze(1), attention_mask=mask, past_key_values=cache, use_cache=True
        )
        return cast(Tensor, output.last_hidden_state)[:, 0]
