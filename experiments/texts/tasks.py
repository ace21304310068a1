"""Four multiple-choice tasks, closed book, and public text that has nothing to do with them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from blindtune.data.public_text import read_lines
from blindtune.data.questions import Fields, TokenizedQuestion, load_questions, tokenize
from blindtune.data.tables import read_table
from blindtune.models import Tokenizer
from experiments.labels.tasks import DATA

TASKS = ("sciq", "openbookqa", "arc_easy", "arc_challenge")
TRAIN_EACH, TEST_EACH, VALIDATION_EACH = 250, 250, 75
MAX_LENGTH = 96
FIELDS = Fields("choice")
PUBLIC = ("masc/train", "wikitext2/validation", "wikitext2/test")


def path_of(task: str, split: str) -> Path:
    return DATA / task / f"{split}.jsonl.gz"


def write_training(path: Path, seed: int) -> int:
    """A file of questions of all tasks, another part of them for each seed; how many."""
    rows: list[dict[str, Any]] = []
    for task in TASKS:
        all_rows = read_table(str(path_of(task, "train")), "train").to_pylist()
        rows += random.Random(f"{task} {seed}").sample(all_rows, TRAIN_EACH)
    random.Random(seed).shuffle(rows)
    write_questions(path, rows)
    return len(rows)


def write_questions(path: Path, rows: list[dict[str, Any]]) -> None:
    """As `blindtune texts train` reads them, without supporting texts."""
    kept = [{key: row[key] for key in ("question", "choices", "answer")} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))


def questions_of(path: Path, tokenizer: Tokenizer, most: int | None = None) -> list[TokenizedQuestion]:
    """Tokenized, a random part of them that is always the same."""
    found = load_questions(str(path), FIELDS)
    if most is not None and most < len(found):
        found = random.Random(0).sample(found, most)
    return tokenize(found, tokenizer, max_length=MAX_LENGTH)


def public_rows(tokenizer: Tokenizer, longest: int, seed: int) -> list[list[int]]:
    """What attackers learn from."""
    lines = [line for name in PUBLIC for line in read_lines(DATA / f"{name}.jsonl.gz")]
    random.Random(seed).shuffle(lines)
    return [list(row.ids) for row in tokenizer.rows(lines, max_length=longest)]
