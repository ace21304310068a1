"""Direct Forward: the pretrained top predicts the next token from s_B, so position t gives token t + 1.

No position predicts the first token of a text. For it, the attack guesses the most frequent first token of public text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blindtune.audit.texts.attacker import Attacker, chunks
from blindtune.audit.texts.observe import Observed
from blindtune.audit.texts.registry import attack
from blindtune.audit.texts.shortlist import Shortlist
from blindtune.models.cut.parts import pack, unpack


@attack("direct forward", observes=("s_B",), needs=("top", "public text"))
def direct_forward(observed: Observed, attacker: Attacker) -> Tensor:
    head_inputs = head_input(observed, attacker)
    next_tokens = torch.cat([(hidden @ attacker.head.T).argmax(1) for hidden in head_inputs.split(256)])
    return after_first(next_tokens, observed, attacker)


def head_input(observed: Observed, attacker: Attacker) -> Tensor:
    """Returns the output of the pretrained top for s_B, which is the input of the LM head, `(N, e)`."""
    top = attacker.model.parts["top"]
    dtype = next(top.parameters()).dtype
    lengths = observed.lengths.to(attacker.device)
    with torch.no_grad():
        parts = [pack(top(unpack(hidden.to(dtype), n), n), n).float() for hidden, n in chunks(observed.s_b, lengths)]
    return torch.cat(parts)


def after_first(next_tokens: Tensor, observed: Observed, attacker: Attacker) -> Tensor:
    """Returns guesses for each position `(N,)`, given guesses for the next token of each position `(N,)`."""
    guesses = next_tokens.roll(1)
    guesses[observed.positions == 0] = attacker.log_first_frequencies.argmax()
    return guesses


def shortlist_after_first(next_tokens: Shortlist, observed: Observed, attacker: Attacker) -> Shortlist:
    """Returns candidates for each position, given candidates for the next token of each position."""
    ids, scores = next_tokens.ids.roll(1, 0), next_tokens.scores.roll(1, 0)
    best = attacker.log_first_frequencies.topk(ids.shape[1])
    first = observed.positions == 0
    ids[first], scores[first] = best.indices, best.values
    return Shortlist(ids, scores)
