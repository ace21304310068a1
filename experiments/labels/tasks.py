"""The tasks: which rows to train, select and report on, with which model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from blindtune.data import Columns, Examples, load_examples, split_examples

DATA = Path(os.environ.get("BLINDTUNE_DATA", Path(__file__).parents[3] / "shared" / "data"))


@dataclass(frozen=True)
class Task:
    """A data set and a model.

    Attributes:
        model: as `load_backbone` takes it, or mpnet (`experiments.mpnet`).
        first: adapters sit on this block and those above; outputs of the blocks below are computed once for each text.
        steps: of 32 examples.
        held_out: part of the training rows to select on, for sets without validation rows.
    """

    data: str
    model: str
    first: int
    steps: int
    max_length: int
    train: str = "train"
    validation: str | None = "validation"
    text: str = "text"
    pair: str | None = None
    held_out: float = 0.1
    attacked: int = 1000
    most_train: int | None = None
    most_test: int | None = None
    """Random rows to use of those there are; of validation as of test."""

    def load(self) -> tuple[Examples, Examples, Examples]:
        """Training, validation and test examples."""
        columns = Columns(self.text, "label", self.pair)
        folder = DATA / self.data
        train = load_examples(str(folder / f"{self.train}.jsonl.gz"), columns)
        test = load_examples(str(folder / "test.jsonl.gz"), columns, classes=train.classes)
        if self.validation is None:
            train, validation = split_examples(train, self.held_out, 0)
        else:
            validation = load_examples(str(folder / f"{self.validation}.jsonl.gz"), columns, classes=train.classes)
        return _some(train, self.most_train), _some(validation, self.most_test), _some(test, self.most_test)


def _some(examples: Examples, most: int | None) -> Examples:
    """A random part, the same at each call."""
    if most is None or len(examples) <= most:
        return examples
    return split_examples(examples, most / len(examples), 0)[1]


TASKS = {
    "sst2": Task("sst2", "minilm", 3, steps=216, max_length=48, train="train_sentences"),
    "mrpc": Task("mrpc", "minilm", 3, steps=230, max_length=80, text="text_a", pair="text_b", attacked=700),
    "trec": Task("trec", "minilm", 3, steps=310, max_length=32, validation=None, attacked=700),
    # never tuned on
    "banking77": Task("banking77", "minilm", 3, steps=560, max_length=32, validation=None),
    "symptom2disease": Task("symptom2disease", "minilm", 3, steps=260, max_length=64, validation=None),
    "sst2-mpnet": Task(
        "sst2",
        "mpnet",
        9,
        steps=94,
        max_length=40,
        train="train_sentences",
        attacked=500,
        most_train=3000,
        most_test=1000,
    ),
    "sst2-smollm2": Task(
        "sst2",
        "smollm2",
        28,
        steps=63,
        max_length=40,
        train="train_sentences",
        attacked=700,
        most_train=2000,
        most_test=800,
    ),
}
