"""Public text for distillation: reads files of lines or records, and joins lines to passages of tokens."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from blindtune.errors import BadEncoding, DataError

if TYPE_CHECKING:
    from blindtune.models import Tokenizer, Tokens
    from blindtune.models.tokenizer import TokenRow

HELD_OUT = 48
"""Number of passages that are held out for evaluation; with fewer than 480 passages, a tenth of them is held out."""


@dataclass(frozen=True)
class PublicText:
    """Passages for distillation, and held-out passages for evaluation."""

    tokenizer: Tokenizer
    training: list[TokenRow]
    held_out: list[TokenRow]
    batch_size: int
    seed: int

    @staticmethod
    def read(paths: Sequence[Path], tokenizer: Tokenizer, *, max_length: int, batch_size: int, seed: int) -> PublicText:
        """Reads all files and holds out random passages.

        Raises:
            DataError: a file can't be read, or there is too little text.
            ConfigError: the special tokens alone are more than `max_length`.
        """
        rows = [row for path in paths for row in passages(read_lines(path), tokenizer, max_length)]
        if len(rows) < 2:
            raise DataError(f"The public text makes {len(rows)} passages.", remedy="Give more text (--public).")
        order = np.random.default_rng(seed).permutation(len(rows)).tolist()
        count = min(HELD_OUT, max(1, len(rows) // 10))
        held_out, training = [rows[i] for i in order[:count]], [rows[i] for i in sorted(order[count:])]
        return PublicText(tokenizer, training, held_out, batch_size, seed)

    def batches(self) -> Iterator[Tokens]:
        """Yields batches for distillation, without end, in another order in each epoch."""
        from blindtune.data.batches import BatchPlan

        plan, step = BatchPlan([len(row) for row in self.training], self.batch_size, self.seed), 0
        while True:
            yield self.tokenizer.pad([self.training[i] for i in plan.batch(step)])
            step += 1

    def measured(self) -> Iterator[Tokens]:
        """Yields the held-out batches."""
        for start in range(0, len(self.held_out), self.batch_size):
            yield self.tokenizer.pad(self.held_out[start : start + self.batch_size])

    def __str__(self) -> str:
        tokens = sum(len(row) for row in self.training)
        return f"{len(self.training)} passages ({tokens} tokens) of public text, {len(self.held_out)} held out"


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a `.txt` file, or of the column `text` of the formats that `load_examples` reads.

    Text files may be compressed (`.gz`). Empty lines are removed.

    Raises:
        DataError: there is no such file, or it can't be read as text.
    """
    from blindtune.data import Columns, load_examples

    if not path.is_file():
        raise DataError(f"There is no file {path}.", remedy="Check the path (--public).")
    if path.name.endswith((".txt", ".txt.gz")):
        try:
            content = path.read_bytes()
            texts = [(gzip.decompress(content) if path.suffix == ".gz" else content).decode()]
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise BadEncoding(f"{path} can't be read: {error}.", remedy="Give UTF-8 text, plain or .gz.") from None
    else:
        texts = [str(text) for text in load_examples(str(path), Columns("text")).texts]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    return [line for line in lines if line]


def passages(lines: Sequence[str], tokenizer: Tokenizer, max_length: int) -> list[TokenRow]:
    """Joins consecutive lines to passages of at most `max_length` tokens. Longer lines are truncated.

    Raises:
        ConfigError: the special tokens alone are more than `max_length`.
    """
    joined: list[list[str]] = []
    room = 0
    for line, row in zip(lines, tokenizer.rows(lines, max_length=max_length), strict=True):
        if len(row) + 1 > room:
            joined.append([])
            room = max_length
        joined[-1].append(line)
        room -= len(row) + 1  # one token for the line break
    rows = tokenizer.rows(["\n".join(group) for group in joined], max_length=max_length)
    return [row for row in rows if len(row) > 1]


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
