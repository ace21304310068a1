"""Floors: attacks that observe only the lengths. An attack that isn't better than a floor has recovered nothing."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from blindtune.audit.texts.attacker import Attacker
from blindtune.audit.texts.observe import Observed
from blindtune.audit.texts.registry import attack


@attack("unigram guess", needs=("public text",))
def unigram(observed: Observed, attacker: Attacker) -> Tensor:
    """Guesses the most frequent token of public text at every position."""
    return attacker.log_frequencies.argmax().expand(int(observed.lengths.sum())).clone()


@attack("language model guess", needs=("bottom", "trunk", "top", "public text"))
@torch.no_grad()
def language_model(observed: Observed, attacker: Attacker) -> Tensor:
    """Continues the most frequent first token greedily with the pretrained model."""
    generated = attacker.log_first_frequencies.argmax().reshape(1, 1)
    causal = cast(Any, attacker.model.causal)
    for _ in range(int(observed.lengths.max()) - 1):
        mask = torch.ones_like(generated)
        next_token = causal(input_ids=generated, attention_mask=mask, use_cache=False).logits[:, -1].argmax(-1)
        generated = torch.cat([generated, next_token.unsqueeze(1)], dim=1)
    return torch.cat([generated[0, :length] for length in observed.lengths.tolist()])
