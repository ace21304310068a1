"""Runs a decoder token by token, and computes hidden states of possible next tokens, with a cache of keys and values.

With the cache, the earlier tokens of a text aren't computed again for each next token. The decoder may be a whole model
or a bottom, which has only the first blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from blindtune.models.cut.parts import decoder_of


class Reader:
    """Runs a decoder over B texts, token by token, and keeps their keys and values.

    Args:
        sent: maps tokens to those that the decoder reads instead.
    """

    def __init__(self, causal: nn.Module, sent: Callable[[Tensor], Tensor] = lambda ids: ids) -> None:
        self._decoder, self._cache, self._sent = decoder_of(causal), DynamicCache(), sent

    def read(self, tokens: Tensor) -> Tensor:
        """Appends one token to each text, and returns its hidden states `(B, d)`."""
        return self._run(tokens, self._cache)

    def imagine(self, candidates: Tensor) -> Tensor:
        """Returns the hidden states `(B, K, d)` that `candidates (B, K)` would have as next tokens."""
        count, width = candidates.shape
        cache = copy.deepcopy(self._cache)
        if cache.get_seq_length():
            cache.batch_repeat_interleave(width)
        return self._run(candidates.flatten(), cache).reshape(count, width, -1)

    def keep(self, count: int) -> None:
        """Drops all texts except the first `count`."""
        if self._cache.get_seq_length():
            self._cache.batch_select_indices(torch.arange(count))

    def _run(self, tokens: Tensor, cache: DynamicCache) -> Tensor:
        length = cache.get_seq_length() + 1
        mask = torch.ones(len(tokens), length, dtype=torch.long, device=tokens.device)
        output = self._decoder(
            input_ids=self._sent(tokens).unsqueeze(1), attention_mask=mask, past_key_values=cache, use_cache=True
        )
        return cast(Tensor, output.last_hidden_state)[:, 0]
