"""Groups of tokens: what they promise, and that they are made of like tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from blindtune.errors import ConfigError
from blindtune.privacy.token_groups import token_groups


def words(count: int = 400, width: int = 200) -> torch.Tensor:
    """Embeddings around 40 directions."""
    torch.manual_seed(0)
    return torch.randn(40, width).repeat(count // 40, 1) + 0.3 * torch.randn(count, width)


@pytest.mark.parametrize("size", [2, 4, 10])
def test_every_token_shares_its_place_with_others(size: int) -> None:
    sent = token_groups(words(), size)
    representatives, counts = sent.unique(return_counts=True)
    assert set(counts.tolist()) == {size}  # 400 is a multiple of each
    assert torch.equal(sent[representatives], representatives)  # a representative is sent as itself
    assert (sent <= torch.arange(400)).all()  # the lowest number of the group


def test_members_are_alike() -> None:
    embeddings = words()
    sent = token_groups(embeddings, 4)
    similar = F.cosine_similarity(embeddings, embeddings[sent])
    moved = sent != torch.arange(400)
    others = F.cosine_similarity(embeddings, embeddings[sent.roll(1)])
    assert similar[moved].median() > 0.8
    assert others.median() < 0.2


def test_special_tokens_stay_and_a_remainder_is_a_smaller_group() -> None:
    sent = token_groups(words(40), 4, fixed={0, 7, 9})
    assert [int(sent[token]) for token in (0, 7, 9)] == [0, 7, 9]
    assert (sent[sent == 7].numel(), sent[sent == 0].numel()) == (1, 1)
    counts = sent[[t for t in range(40) if t not in (0, 7, 9)]].unique(return_counts=True)[1]
    assert sorted(counts.tolist()) == [1] + [4] * 9


def test_the_same_embeddings_give_the_same_groups_whatever_is_drawn() -> None:
    first = token_groups(words(), 4)
    torch.manual_seed(5)
    assert torch.equal(first, token_groups(words(), 4))


def test_a_group_of_one_hides_nothing() -> None:
    with pytest.raises(ConfigError, match="Groups of 1"):
        token_groups(words(), 1)
