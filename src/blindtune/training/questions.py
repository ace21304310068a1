"""Prompts with possible continuations: multiple choice, classes as words, or pairs of instruction and answer.

    | kind           | columns                       | continuations            |
    |----------------|-------------------------------|--------------------------|
    | choice         | what the template names, choices, answer | the choices    |
    | classification | what the template names, label | the class names         |
    | instruction    | what the template names, answer | the answer alone        |
    | text           | what the template names       | the text itself, after its first token |

A template is a format string over the file's columns, e.g. `Question: {question}\\nAnswer:`. Continuations follow it
after a space. Training is on the right one; evaluation asks which one the model finds likeliest, as the LM evaluation
harness does. Plain text is for decorrelating a bottom before there is a task.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from blindtune.errors import BadLabels, ConfigError, DataError, EmptyRows, MissingColumn, SequenceTooLong
from blindtune.models import Tokenizer
from blindtune.training.data import Columns, examples_of, read_column, read_table, some_of

Kind = Literal["choice", "classification", "instruction", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TEMPLATES: dict[Kind, str] = {
    "choice": "Question: {question}\nAnswer:",
    "classification": "{text}\nLabel:",
    "instruction": "{prompt}",
    "text": "{text}",
}


@dataclass(frozen=True)
class Question:
    """A prompt, the texts that may follow it (each with its leading space), and the index of the right one.

    Without a prompt the continuation is a whole text.
    """

    prompt: str
    continuations: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Fields:
    """Where a file's questions are."""

    kind: Kind
    template: str | None = None
    choices: str = "choices"
    answer: str = "answer"
    label: str = "label"


@dataclass(frozen=True)
class TokenizedQuestion:
    """Tokens of prompt and continuation for each continuation; the prompt's are the first `starts[i]`."""

    rows: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    characters: tuple[int, ...]
    """Of each continuation, without its leading space."""
    answer: int

    @property
    def row(self) -> tuple[int, ...]:
        """The right one."""
        return self.rows[self.answer]

    @property
    def start(self) -> int:
        return self.starts[self.answer]


def load_questions(
    source: str, fields: Fields, *, classes: Sequence[str] | None = None, split: str = "train"
) -> list[Question]:
    """Reads a file or a hub data set, see `load_examples`.

    Args:
        classes: class names in order, for classification.
    Raises:
        DataError: missing columns, rows without a prompt, answers that aren't among the choices.
        ConfigError: a template that can't be read.
    """
    table = read_table(source, split)
    template = fields.template or TEMPLATES[fields.kind]
    prompts = _prompts(table, source, template)
    if fields.kind == "text":
        return [Question("", (text,), 0) for text in prompts]
    if fields.kind == "classification":
        columns = [name for name in _names(template) if name in table.column_names]
        examples = examples_of(table, source, Columns(columns[0], fields.label), classes)
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


def tokenize(questions: Sequence[Question], tokenizer: Tokenizer, *, max_length: int) -> list[TokenizedQuestion]:
    """Prompt and continuation are tokenized together; what the prompt's own tokens number is the prompt.

    Prompts that are too long lose their beginning; texts without a prompt, their end.

    Raises:
        SequenceTooLong: a continuation that leaves no room for a token of the prompt.
        DataError: a text of one token, of which nothing can be learned.
    """
    prompts = [q.prompt for q in questions]
    starts = [len(row) for row in tokenizer.rows(prompts, max_length=2**20)]
    texts = [q.prompt + continuation for q in questions for continuation in q.continuations]
    rows = iter(tokenizer.rows(texts, max_length=2**20))
    done: list[TokenizedQuestion] = []
    for number, (question, start) in enumerate(zip(questions, starts, strict=True), 1):
        tokens: list[tuple[int, ...]] = []
        begins: list[int] = []
        for continuation in question.continuations:
            ids = next(rows).ids
            if not question.prompt:
                if len(ids) < 2:
                    raise DataError(f"Text {number} has one token.", remedy="Remove it, or join texts.")
                tokens.append(ids[:max_length])
                begins.append(1)
                continue
            begin = min(start, len(ids) - 1)  # where the last token of the prompt grew into the continuation
            surplus = max(0, len(ids) - max_length)
            if begin - surplus < 1:
                raise SequenceTooLong(
                    f"Question {number}: {continuation[:40]!r} has {len(ids) - begin} tokens of {max_length} allowed.",
                    remedy="Raise --max-length, or shorten the answers.",
                )
            tokens.append(ids[surplus:])
            begins.append(begin - surplus)
        lengths = tuple(len(c) - bool(question.prompt) for c in question.continuations)
        done.append(TokenizedQuestion(tuple(tokens), tuple(begins), lengths, question.answer))
    return done


def _names(template: str) -> list[str]:
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
    names = _names(template)
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise MissingColumn(
            f"The template names {missing[0]!r}, which {source} doesn't have.",
            remedy=f"It has: {', '.join(table.column_names)}. Give --template.",
        )
    columns = [["" if v is None else str(v) for v in read_column(table, source, name)] for name in names]
    prompts = [template.format(**dict(zip(names, row, strict=True))).strip() for row in zip(*columns, strict=True)]
    empty = [row for row, values in enumerate(zip(*columns, strict=True), 1) if not "".join(values).strip()]
    if empty:
        raise EmptyRows(f"{source} has no prompt in rows {some_of(empty)}.", remedy="Fill or remove them.")
    return prompts


def _choices(value: Any, source: str, row: int) -> list[str]:
    """A list, or JSON of one, or texts between `|`."""
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
    """The right choice: by index, by letter, or word for word."""
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
