"""Groups of K tokens: every token is replaced by its group's first member, so that messages depend on groups alone.

    token ──▶ its group's first member ──▶ bottom ──▶ s_A

The messages don't distinguish the members of a group. Groups are disjoint sets of tokens with similar
embeddings, computed from the public embeddings. This is generalisation, as in k-anonymity (Sweeney 2002), of each token
of a text. An attacker can still use a language model to guess which member of a group fits the context, which reveals
much. Unlike noise on hidden states, grouping covers the whole text: rows of later tokens depend on earlier tokens only
through their groups. Sending a text again reveals nothing new.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from blindtune.errors import ConfigError

TIDY_EVERY = 512
"""Number of tokens after which the tokens that already have a group are removed from the search."""


def token_groups(embeddings: Tensor, size: int, *, fixed: Collection[int] = ()) -> Tensor:
    """Returns for each token the one that replaces it, `(V,)` int64: the lowest id in its group.

    Lower ids are earlier merges of a byte-pair tokenizer, so roughly the more frequent tokens. In the order of ids,
    each token that has no group forms one with the `size` − 1 tokens without a group that have the largest cosine
    similarity.

    Args:
        embeddings: `(V, e)`.
        size: K, the number of tokens in a group; the last groups may be smaller.
        fixed: tokens that are never replaced, such as special tokens.
    Raises:
        ConfigError: `size` is less than two.
    """
    if size < 2:
        raise ConfigError(f"Groups of {size} tokens.", remedy="Use at least 2, or 0 for none.")
    directions = torch.nn.functional.normalize(embeddings.detach().float(), dim=1)
    replacement = torch.arange(len(directions))
    free = torch.tensor([token not in fixed for token in range(len(directions))])
    candidates = free.nonzero()[:, 0]
    points = directions[candidates]
    for token in replacement.tolist():
        if not free[token]:
            continue
        if token % TIDY_EVERY == 0:
            candidates = candidates[free[candidates]]
            points = directions[candidates]
        similarity = (points @ directions[token]).masked_fill(~free[candidates], -torch.inf)
        members = candidates[similarity.topk(min(size, int(free[candidates].sum()))).indices]
        members = members[members != token][: size - 1]
        free[members], free[token] = False, False
        replacement[members] = token
    return replacement
