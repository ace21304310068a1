"""Tokens in groups of K: whatever is sent depends on the groups alone, so nobody can tell the members of one apart.

    token ──▶ its group's first member ──▶ bottom ──▶ s_A

Groups are disjoint, of tokens with similar embeddings, and follow from the public embeddings. It is generalisation, as
in k-anonymity (Sweeney 2002), for each token of a text; what the language model expects of a member in its context is
left to whoever reads, and that is much. Unlike noise on hidden states it covers the whole text: later rows depend on
earlier tokens through their groups too. Sending a text again tells nothing new.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from blindtune.errors import ConfigError

TIDY_EVERY = 512
"""Tokens that have found their group are left out of the search after so many turns."""


def token_groups(embeddings: Tensor, size: int, *, fixed: Collection[int] = ()) -> Tensor:
    """The token that each token is sent as, `(V,)`: the one with the lowest number in its group.

    Lower numbers are earlier merges of a byte-pair tokenizer, so about the more frequent ones: each, in its turn, takes
    the `size` − 1 tokens that are nearest by cosine and still free.

    Args:
        embeddings: `(V, e)`.
        size: K; the last groups may be smaller.
        fixed: tokens that are sent as they are, such as special ones.
    Raises:
        ConfigError: fewer than two tokens in a group.
    """
    if size < 2:
        raise ConfigError(f"Groups of {size} tokens.", remedy="Use at least 2, or 0 for none.")
    directions = torch.nn.functional.normalize(embeddings.detach().float(), dim=1)
    sent = torch.arange(len(directions))
    free = torch.tensor([token not in fixed for token in range(len(directions))])
    left = free.nonzero()[:, 0]
    points = directions[left]
    for turn, token in enumerate(sent.tolist()):
        if not free[token]:
            continue
        if turn % TIDY_EVERY == 0:
            left = left[free[left]]
            points = directions[left]
        near = (points @ directions[token]).masked_fill(~free[left], -torch.inf)
        members = left[near.topk(min(size, int(free[left].sum()))).indices]
        members = members[members != token][: size - 1]
        free[members], free[token] = False, False
        sent[members] = token
    return sent
