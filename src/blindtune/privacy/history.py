"""Which runs have used the same labels: what they tell adds up, over seeds, searches and methods.

Each run on this machine is registered before it sends anything that depends on labels: its budget, and hashes of its
texts. Its ledger keeps a journal beside that (`Ledger.follow`). A run has used the same labels as another if they share
a text. For runs that one operator sees one after the other, μ² = Σ μ_i² (Gaussian differential privacy composes so).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blindtune.errors import CheckpointError
from blindtune.files import PRIVATE, replace_file
from blindtune.privacy.ledger import read_journal

HOME_VARIABLE = "BLINDTUNE_HOME"
Text = str | Sequence[str]


@dataclass(frozen=True)
class EarlierRun:
    """A run on some of the same texts.

    Attributes:
        mu: of everything that one operator saw of it; its whole budget where its ledger is gone, and infinite for a run
            that sent adapters in the clear.
        shared: texts in common.
    """

    run: str
    mu: float
    shared: int


class LabelHistory:
    """The runs of this machine.

    Args:
        home: folder of the records; `$BLINDTUNE_HOME/runs`, or `~/.local/share/blindtune/runs`, if left out.
    """

    def __init__(self, home: str | Path | None = None) -> None:
        base = os.environ.get(HOME_VARIABLE) or Path.home() / ".local" / "share" / "blindtune"
        chosen = Path(home) if home is not None else Path(base) / "runs"
        self.home = chosen.expanduser().absolute()  # wherever the process goes

    def register(self, run: str, budget: float, texts: Iterable[Text]) -> None:
        """Notes a run before it sends anything.

        Args:
            run: the name of its ledger, if it has one.
            budget: μ that it may spend; infinite if nothing bounds what it tells.
            texts: as strings, or pairs of strings.
        Raises:
            CheckpointError: the record can't be written.
        """
        record = {"run": run, "budget": None if math.isinf(budget) else budget}
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            known, hashes = self.home / f"{run}.texts", _hashes(texts)
            if known.exists():  # a checkpoint that goes on with other texts
                hashes = np.union1d(hashes, np.frombuffer(known.read_bytes(), dtype="<u8"))
            replace_file(known, hashes.tobytes(), PRIVATE)
            replace_file(self.home / f"{run}.json", (json.dumps(record) + "\n").encode(), PRIVATE)
        except OSError as error:
            raise CheckpointError(
                f"{self.home} can't be written: {error}.",
                remedy=f"It adds up what runs on the same labels tell. Set {HOME_VARIABLE} to a folder of yours.",
            ) from None

    def earlier(self, texts: Iterable[Text], *, but: str = "") -> list[EarlierRun]:
        """Runs on some of these texts, except the one with the id `but`."""
        mine = _hashes(texts)
        found: list[EarlierRun] = []
        for path in sorted(self.home.glob("*.json")):
            record = json.loads(path.read_text())
            try:
                theirs = np.frombuffer(path.with_suffix(".texts").read_bytes(), dtype="<u8")
            except OSError:
                continue
            shared = len(np.intersect1d(mine, theirs, assume_unique=True))
            if shared and record["run"] != but:
                budget = record["budget"]
                mu = math.inf if budget is None else self._spent(record["run"], budget)
                found.append(EarlierRun(record["run"], mu, shared))
        return found

    def _spent(self, run: str, budget: float) -> float:
        try:
            mu = read_journal(self.home / f"{run}.jsonl").guarantee().mu
        except (OSError, CheckpointError):
            return budget
        return budget if mu is None else mu


def total_mu(runs: Iterable[EarlierRun], budget: float) -> float:
    """μ of a run with this budget and all earlier ones together."""
    return math.sqrt(budget**2 + sum(run.mu**2 for run in runs))


def _hashes(texts: Iterable[Text]) -> NDArray[np.uint64]:
    """Sorted, each once: 64 bits of SHA-256."""
    digests = b"".join(
        hashlib.sha256("\x1f".join([text] if isinstance(text, str) else text).encode()).digest()[:8] for text in texts
    )
    return np.unique(np.frombuffer(digests, dtype="<u8"))
