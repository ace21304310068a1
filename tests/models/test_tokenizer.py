"""Texts to rows to batches, as the model's own tokenizer in transformers does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from blindtune.errors import ConfigError
from blindtune.models import FrozenBackbone, Tokenizer

PAIRS = [("A film.", "It is long and it is not good at all."), ("One sentence here.", "Yes."), ("", "nothing before")]


@pytest.fixture(scope="module")
def stock(minilm: FrozenBackbone) -> Any:
    return AutoTokenizer.from_pretrained(minilm.source.location)


@pytest.fixture
def tokenizer(minilm: FrozenBackbone) -> Tokenizer:
    return Tokenizer(minilm.tokenizer, pad_token_id=minilm.pad_token_id, with_types=True)


@pytest.mark.parametrize("max_length", [5, 12, 128])
def test_batches_equal_those_of_transformers(
    max_length: int, tokenizer: Tokenizer, stock: Any, film_sentences: list[str]
):
    texts = film_sentences[:40]
    tokens = tokenizer.pad(tokenizer.rows(texts, max_length=max_length))
    expected = stock(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    assert torch.equal(tokens.input_ids.long(), expected["input_ids"])
    assert torch.equal(tokens.lengths.long(), expected["attention_mask"].sum(1))


def test_pairs_carry_token_types_and_lose_words_of_the_longer_text_first(tokenizer: Tokenizer, stock: Any):
    for max_length in (8, 64):
        tokens = tokenizer.pad(tokenizer.rows(PAIRS, max_length=max_length))
        expected = stock(
            [a for a, _ in PAIRS],
            [b for _, b in PAIRS],
            padding=True,
            truncation="longest_first",
            max_length=max_length,
            return_tensors="pt",
        )
        assert tokens.token_type_ids is not None
        assert torch.equal(tokens.input_ids.long(), expected["input_ids"])
        assert torch.equal(tokens.token_type_ids.long(), expected["token_type_ids"])


def test_dtypes_are_those_of_the_wire(tokenizer: Tokenizer):
    tokens = tokenizer.pad(tokenizer.rows(["a", "b c"], max_length=16))
    assert {name: t.dtype for name, t in tokens.tensors().items()} == {
        "input_ids": torch.int32,
        "lengths": torch.int32,
        "token_type_ids": torch.uint8,
    }


def test_a_model_without_token_types_gets_none(minilm: FrozenBackbone):
    tokenizer = Tokenizer(minilm.tokenizer, pad_token_id=7, with_types=False)
    tokens = tokenizer.pad(tokenizer.rows(["a", "b c d"], max_length=16))
    assert "token_type_ids" not in tokens.tensors()
    assert tokens.input_ids[0, int(tokens.lengths[0])] == 7


def test_equal_texts_give_equal_rows_that_can_be_looked_up(tokenizer: Tokenizer):
    first, second, other = tokenizer.rows(["a film", "a film", "two films"], max_length=16)
    assert first == second != other
    assert {first: 1}[second] == 1
    assert len(first) == 4


def test_the_truncation_of_one_call_does_not_last(tokenizer: Tokenizer):
    text = "one two three four five six seven eight"
    assert [len(tokenizer.rows([text], max_length=n)[0]) for n in (4, 20, 6)] == [4, 10, 6]


def test_a_length_that_has_no_room_for_the_special_tokens_is_refused(tokenizer: Tokenizer):
    assert len(tokenizer.rows(["one two"], max_length=2)[0]) == 2
    with pytest.raises(ConfigError, match="max_length is 1"):
        tokenizer.rows(["one two"], max_length=1)
    with pytest.raises(ConfigError, match="max_length is 2"):
        tokenizer.rows([("one", "two")], max_length=2)


def test_no_texts_make_an_empty_batch(tokenizer: Tokenizer):
    tokens = tokenizer.pad(tokenizer.rows([], max_length=16))
    assert len(tokens) == 0
