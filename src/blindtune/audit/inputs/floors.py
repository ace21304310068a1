"""Floors: guesses by an attacker who has seen nothing but lengths. Whatever doesn't beat them has learned nothing."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from blindtune.audit.inputs.attacker import Attacker
from blindtune.audit.inputs.observe import Observed
from blindtune.audit.inputs.registry import attack


@attack("unigram guess", needs=("public text",))
def unigram(observed: Observed, attacker: Attacker) -> Tensor:
    """The most frequent token of public text, everywhere."""
    return attacker.log_frequencies.argmax().expand(int(observed.lengths.sum())).clone()


@attack("language model guess", needs=("bottom", "trunk", "top", "public text"))
@torch.no_grad()
def language_model(observed: Observed, attacker: Attacker) -> Tensor:
    """What the pretrained model says, token by token, after the most frequent first token."""
    said = attacker.log_first_frequencies.argmax().reshape(1, 1)
    causal = cast(Any, attacker.model.causal)
    for _ in range(int(observed.lengths.max()) - 1):
        mask = torch.ones_like(said)
        next_token = causal(input_ids=said, attention_mask=mask, use_cache=False).logits[:, -1].argmax(-1)
        said = torch.cat([said, next_token.unsqueeze(1)], dim=1)
    return torch.cat([said[0, :length] for length in observed.lengths.tolist()])
