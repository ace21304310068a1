"""Questions from files: templates, three kinds, and what is wrong with a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from blindtune.data.questions import Fields, Question, load_questions, tokenize
from blindtune.errors import (
    BadLabels,
    BlindtuneError,
    ConfigError,
    DataError,
    EmptyRows,
    MissingColumn,
    SequenceTooLong,
)
from blindtune.models import FrozenBackbone, Tokenizer, load_backbone

ROW = {"question": "What is red?", "choices": ["sky", "blood", "grass"], "answer": 1}


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "row",
    [ROW, {**ROW, "answer": "B"}, {**ROW, "answer": "blood"}, {**ROW, "answer": "1"},
     {**ROW, "choices": "sky|blood|grass"}, {**ROW, "choices": '["sky", "blood", "grass"]'}],
    ids=["index", "letter", "text", "digit", "bars", "json"],
)  # fmt: skip
def test_ways_to_write_a_choice(tmp_path: Path, row: dict[str, Any]) -> None:
    found = load_questions(write(tmp_path, [row]), Fields("choice"))
    assert found == [Question("Question: What is red?\nAnswer:", (" sky", " blood", " grass"), 1)]


def test_a_number_is_an_index_even_where_choices_are_numbers(tmp_path: Path) -> None:
    row = {"question": "1 + 1?", "choices": ["1", "2", "0"], "answer": 1}
    assert load_questions(write(tmp_path, [row]), Fields("choice"))[0].answer == 1


def test_a_template_names_any_columns(tmp_path: Path) -> None:
    source = write(tmp_path, [{**ROW, "support": "Blood is red."}, {**ROW, "support": None}])
    found = load_questions(source, Fields("choice", "{support}\n{question}"))
    assert [question.prompt for question in found] == ["Blood is red.\nWhat is red?", "What is red?"]


def test_classes_become_words(tmp_path: Path) -> None:
    rows = [{"text": f"note {i}", "label": "ill" if i % 3 else "well"} for i in range(6)]
    found = load_questions(write(tmp_path, rows), Fields("classification"))
    assert found[0] == Question("note 0\nLabel:", (" ill", " well"), 1)


def test_integer_labels_get_the_names_of_their_classes(tmp_path: Path) -> None:
    source = write(tmp_path, [{"text": f"note {i}", "label": i % 2} for i in range(6)])
    found = load_questions(source, Fields("classification", classes=["well", "ill"]))
    assert [(q.continuations, q.answer) for q in found[:2]] == [((" well", " ill"), 0), ((" well", " ill"), 1)]


def test_instructions_have_one_continuation(tmp_path: Path) -> None:
    source = write(tmp_path, [{"prompt": "Say hello.", "answer": "Hello!"}])
    assert load_questions(source, Fields("instruction")) == [Question("Say hello.", (" Hello!",), 0)]


@pytest.mark.parametrize(
    ("rows", "fields", "error", "says"),
    [
        ([{**ROW, "answer": 3}], Fields("choice"), BadLabels, "Row 1.*answer 3"),
        ([{**ROW, "answer": "sky"}, {**ROW, "answer": "purple"}], Fields("choice"), BadLabels, "Row 2.*purple"),
        ([{**ROW, "choices": ["sky"]}], Fields("choice"), DataError, "1 choices"),
        ([{**ROW, "choices": "sky"}], Fields("choice"), DataError, "1 choices"),
        ([{**ROW, "question": ""}], Fields("choice"), EmptyRows, "rows 1"),
        ([{"question": "?", "answer": 0}], Fields("choice"), MissingColumn, "choices"),
        ([ROW], Fields("choice", "{context} {question}"), MissingColumn, "context"),
        ([ROW], Fields("choice", "no column"), ConfigError, "names no column"),
        ([ROW], Fields("choice", "{question"), ConfigError, "can't be read"),
        ([{"prompt": "x", "answer": " "}], Fields("instruction"), EmptyRows, "no answer in rows 1"),
    ],
)
def test_what_is_wrong(
    tmp_path: Path, rows: list[dict[str, Any]], fields: Fields, error: type[BlindtuneError], says: str
) -> None:
    with pytest.raises(error, match=says):
        load_questions(write(tmp_path, rows), fields)


@pytest.fixture(scope="module")
def tokenizer(tiny_causal: dict[str, Path]) -> Tokenizer:
    backbone: FrozenBackbone = load_backbone(str(tiny_causal["llama"]))
    return Tokenizer(backbone.tokenizer, pad_token_id=0, with_types=False)


def test_tokens_are_those_of_the_models_own_tokenizer(tokenizer: Tokenizer, tiny_causal: dict[str, Path]) -> None:
    question = Question("the film is", (" good", " not a good film"), 1)
    (tokens,) = tokenize([question], tokenizer, max_length=50)
    own = AutoTokenizer.from_pretrained(tiny_causal["llama"])
    assert [list(row) for row in tokens.rows] == [
        own("the film is good")["input_ids"],
        own("the film is not a good film")["input_ids"],
    ]
    assert tokens.starts == (4, 4)  # [CLS] the film is
    assert tokens.row == tokens.rows[1]
    assert tokens.characters == (4, 15)


def test_long_prompts_lose_their_beginning(tokenizer: Tokenizer) -> None:
    (tokens,) = tokenize([Question("a b c d e f the film", (" good",), 0)], tokenizer, max_length=4)
    (whole,) = tokenize([Question("a b c d e f the film", (" good",), 0)], tokenizer, max_length=50)
    assert tokens.row == whole.row[-4:]
    assert tokens.start == 3


def test_an_answer_that_leaves_no_room(tokenizer: Tokenizer) -> None:
    with pytest.raises(SequenceTooLong, match=r"Question 1.*max-length"):
        tokenize([Question("the film", (" is not a good film",), 0)], tokenizer, max_length=5)


def test_plain_text_is_learned_from_its_second_token(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["the film is good", "a long film " * 20]
    found = load_questions(write(tmp_path, [{"text": text} for text in texts]), Fields("text"))
    assert [question.continuations for question in found] == [(text.strip(),) for text in texts]
    short, long = tokenize(found, tokenizer, max_length=10)
    assert short.row == tokenizer.rows(texts[:1], max_length=99)[0].ids
    assert (short.start, long.start, len(long.row)) == (1, 1, 10)
    assert long.row == tokenizer.rows(texts[1:], max_length=99)[0].ids[:10]  # it loses its end
    assert short.characters == (len(texts[0]),)
