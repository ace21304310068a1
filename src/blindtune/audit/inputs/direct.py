"""Direct Forward: the pretrained top on s_B predicts the next token, so token t + 1 is read at position t.

The first token of a text is nobody's next token: there the most frequent first token of public text is guessed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blindtune.audit.inputs.attacker import Attacker, chunks
from blindtune.audit.inputs.observe import Observed
from blindtune.audit.inputs.registry import attack
from blindtune.audit.inputs.shortlist import Shortlist
from blindtune.models.split import pack, unpack


@attack("direct forward", observes=("s_B",), needs=("top", "public text"))
def direct_forward(observed: Observed, attacker: Attacker) -> Tensor:
    read = read_by_head(observed, attacker)
    next_tokens = torch.cat([(hidden @ attacker.head.T).argmax(1) for hidden in read.split(256)])
    return after_first(next_tokens, observed, attacker)


def read_by_head(observed: Observed, attacker: Attacker) -> Tensor:
    """What the LM head reads, `(N, e)`, for s_B."""
    top = attacker.model.parts["top"]
    dtype = next(top.parameters()).dtype
    lengths = observed.lengths.to(attacker.device)
    with torch.no_grad():
        parts = [pack(top(unpack(hidden.to(dtype), n), n), n).float() for hidden, n in chunks(observed.s_b, lengths)]
    return torch.cat(parts)


def after_first(next_tokens: Tensor, observed: Observed, attacker: Attacker) -> Tensor:
    """Guesses `(N,)` from those for each position's next token `(N,)`."""
    guesses = next_tokens.roll(1)
    guesses[observed.positions == 0] = attacker.log_first_frequencies.argmax()
    return guesses


def shortlist_after_first(next_tokens: Shortlist, observed: Observed, attacker: Attacker) -> Shortlist:
    """The same for candidates."""
    ids, scores = next_tokens.ids.roll(1, 0), next_tokens.scores.roll(1, 0)
    best = attacker.log_first_frequencies.topk(ids.shape[1])
    first = observed.positions == 0
    ids[first], scores[first] = best.indices, best.values
    return Shortlist(ids, scores)
