"""Questions: prompts with possible continuations, for multiple choice, classification, instructions and plain text.

    | kind           | columns                        | continuations                          |
    |----------------|--------------------------------|----------------------------------------|
    | choice         | the template's, choices, answer | the choices                           |
    | classification | the template's, label          | the class names                        |
    | instruction    | the template's, answer         | the answer alone                       |
    | text           | the template's                 | the text itself, after its first token |

A template is a format string over the file's columns, e.g. `Question: {question}\\nAnswer:`. A continuation follows the
prompt after a space. Training uses the right continuation. Evaluation compares the likelihoods that the model assigns
to all continuations, as the LM evaluation harness does. Plain text is for decorrelating a bottom before the training on
a task.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

from blindtune.data.tables import Columns, examples_of, read_column, read_table, some_of
from blindtune.errors import BadLabels, ConfigError, DataError, EmptyRows, MissingColumn, SequenceTooLong
from blindtune.models import Tokenizer

Kind = Literal["choice", "classification", "instruction", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TEMPLATES: dict[Kind, str] = {
    "choice": "Question: {question}\nAnswer:",
    "classification": "{text}\nLabel:",
    "instruction": "{prompt}",
    "text": "{text}",
}
OPTIONS: dict[Kind, tuple[str, ...]] = {
    "choice": ("template", "choices", "answer"),
    "classification": ("template", "label", "classes"),
    "instruction": ("template", "answer"),
    "text": ("template",),
}
"""The attributes of `Fields` that each kind uses."""


@dataclass(frozen=True)
class Question:
    """A prompt and its possible continuations. Plain text has an empty prompt and the whole text as continuation.

    Attributes:
        continuations: the texts that may follow the prompt, each with its leading space.
        answer: index of the right continuation.
    """

    prompt: str
    continuations: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Fields:
    """The kind of a file's questions, their template, and the names of the columns that hold them.

    Attributes:
        template: format string of the prompt; None for the kind's default in `TEMPLATES`.
        choices, answer, label: names of columns.
        classes: class names in the order of their indices, for classification with labels that are integers. None for
            the labels in the file.
    """

    kind: Kind
    template: str | None = None
    choices: str = "choices"
    answer: str = "answer"
    label: str = "label"
    classes: Sequence[str] | None = None


@dataclass(frozen=True)
class TokenizedQuestion:
    """A question as one token row for each continuation.

    Attributes:
        rows: tokens of the prompt and continuation i.
        starts: number of tokens of the prompt in row i, so the index of the continuation's first token.
        characters: number of characters of continuation i, without its leading space.
        answer: index of the right continuation.
    """

    rows: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    characters: tuple[int, ...]
    answer: int

    @property
    def row(self) -> tuple[int, ...]:
        """The token row of the right continuation."""
        return self.rows[self.answer]

    @property
    def start(self) -> int:
        """The index of the right continuation's first token."""
        return self.starts[self.answer]


def load_questions(source: str, fields: Fields, *, split: str = "train") -> list[Question]:
    """Reads questions from a file or a hub data set (`load_examples`).

    Raises:
        DataError: columns are missing, rows have no prompt, or answers aren't among the choices.
        ConfigError: the template is invalid.
    """
    table = read_table(source, split)
    template = fields.template or TEMPLATES[fields.kind]
    prompts = _prompts(table, source, template)
    if fields.kind == "text":
        return [Question("", (text,), 0) for text in prompts]
    if fields.kind == "classification":
        columns = [name for name in _names(template) if name in table.column_names]
        examples = examples_of(table, source, Columns(columns[0], fields.label), fields.classes)
        words = tuple(" " + name for name in examples.classes)
        return [Question(p, words, label) for p, label in zip(prompts, examples.labels or [], strict=True)]
    answers = read_column(table, source, fields.answer)
    if fields.kind == "instruction":
        empty = [row for row, answer in enumerate(answers, 1) if not str(answer or "").strip()]
        if empty:
            raise EmptyRows(f"{source} has no answer in rows {some_of(empty)}.", remedy="Fill or remove them.")
        return [Question(p, (" " + str(a).strip(),), 0) for p, a in zip(prompts, answers, strict=True)]
    choices = [_choices(value, source, row) for row, value in enumerate(read_column(table, source, fields.choices), 1)]
    return [
        Question(prompt, tuple(" " + choice for choice in options), _index(answer, options, source, row))
        for row, (prompt, options, answer) in enumerate(zip(prompts, choices, answers, strict=True), 1)
    ]


def with_classes(fields: Fields, questions: Sequence[Question]) -> Fields:
    """Returns the fields with the class names of these questions, so that other files are read with the same classes.

    Args:
        fields: how the questions were read. Fields of other kinds than classification are returned unchanged.
        questions: at least one question.
    """
    if fields.kind != "classification":
        return fields
    return replace(fields, classes=tuple(word.removeprefix(" ") for word in questions[0].continuations))


def tokenize(questions: Sequence[Question], tokenizer: Tokenizer, *, max_length: int) -> list[TokenizedQuestion]:
    """Tokenizes questions. Prompt and continuation are tokenized together.

    The first tokens of a row count as the prompt, as many as the prompt has when it is tokenized alone. Rows that are
    too long are truncated at the beginning of the prompt, or at the end of a text without prompt.

    Raises:
        SequenceTooLong: a continuation leaves no room for a token of the prompt.
        DataError: a text has one token, so that there is no token to predict.
    """
    prompts = [q.prompt for q in questions]
    starts = [len(row) for row in tokenizer.rows(prompts, max_length=2**20)]
    texts = [q.prompt + continuation for q in questions for continuation in q.continuations]
    rows = iter(tokenizer.rows(texts, max_length=2**20))
    tokenized: list[TokenizedQuestion] = []
    for number, (question, start) in enumerate(zip(questions, starts, strict=True), 1):
        tokens: list[tuple[int, ...]] = []
        continuation_starts: list[int] = []
        for continuation in question.continuations:
            ids = next(rows).ids
            if not question.prompt:
                if len(ids) < 2:
                    raise DataError(f"Text {number} has one token.", remedy="Remove it, or join texts.")
                tokens.append(ids[:max_length])
                continuation_starts.append(1)
                continue
            # the prompt's last token may merge with the continuation; the row's last token then counts as continuation
            begin = min(start, len(ids) - 1)
            surplus = max(0, len(ids) - max_length)
            if begin - surplus < 1:
                raise SequenceTooLong(
                    f"Question {number}: {continuation[:40]!r} has {len(ids) - begin} tokens of {max_length} allowed.",
                    remedy="Raise --max-length, or shorten the answers.",
                )
            tokens.append(ids[surplus:])
            continuation_starts.append(begin - surplus)
        characters = tuple(len(c) - bool(question.prompt) for c in question.continuations)
        tokenized.append(TokenizedQuestion(tuple(tokens), tuple(continuation_starts), characters, question.answer))
    return tokenized


def _names(template: str) -> list[str]:
    """Returns the columns that a template names. Raises `ConfigError`."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(
            f"The template {template!r} can't be read: {error}.", remedy="Write columns as {name}."
        ) from None
    if not names or not all(name.isidentifier() for name in names):
        raise ConfigError(f"The template {template!r} names no column.", remedy="Write columns as {name}.")
    return names


def _prompts(table: Any, source: str, template: str) -> list[str]:
    """Returns the prompt of each row. Raises `MissingColumn` or `EmptyRows`."""
    names = _names(template)
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise MissingColumn(
            f"The template names {missing[0]!r}, which {source} doesn't have.",
            remedy=f"It has: {', '.join(table.column_names)}. Name its columns with --question template=….",
        )
    columns = [["" if v is None else str(v) for v in read_column(table, source, name)] for name in names]
    prompts = [template.format(**dict(zip(names, row, strict=True))).strip() for row in zip(*columns, strict=True)]
    empty = [row for row, values in enumerate(zip(*columns, strict=True), 1) if not "".join(values).strip()]
    if empty:
        raise EmptyRows(f"{source} has no prompt in rows {some_of(empty)}.", remedy="Fill or remove them.")
    return prompts


def _choices(value: Any, source: str, row: int) -> list[str]:
    """Returns the choices in a cell: a list, a list as JSON, or texts separated by `|`. Raises `DataError`."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("[") else value.split("|")
        except ValueError:
            value = None
    options = [str(option).strip() for option in cast("list[Any]", value)] if isinstance(value, list) else []
    if len(options) < 2 or not all(options):
        raise DataError(
            f"Row {row} of {source} has {len(options)} choices.",
            remedy="Give a list of at least two texts in each row.",
        )
    return options


def _index(answer: Any, options: Sequence[str], source: str, row: int) -> int:
    """Returns the index of the right choice, given as its text, an index from 0, or a letter. Raises `BadLabels`."""
    text = str(answer).strip()
    if text in options and not isinstance(answer, int):
        return options.index(text)
    if text.isdigit() and int(text) < len(options):
        return int(text)
    if len(text) == 1 and 0 <= ord(text.upper()) - ord("A") < len(options):
        return ord(text.upper()) - ord("A")
    raise BadLabels(
        f"Row {row} of {source} has the answer {answer!r}, which is none of its {len(options)} choices.",
        remedy="Give an index from 0, a letter from A, or the choice's text.",
    )
