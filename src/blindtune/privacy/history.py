"""Keeps a record of earlier runs on the same labels. Their privacy losses add up, over seeds, searches and methods.

Each run on this machine is registered with its budget and hashes of its texts before it sends anything that depends on
labels. Its ledger keeps a journal in the same folder (`Ledger.follow`). Two runs count as runs on the same labels if
they share a text. For consecutive runs that one operator sees, μ² = Σ μ_i² (composition of Gaussian differential
privacy).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blindtune.errors import CheckpointError
from blindtune.files import HOME_VARIABLE, PRIVATE, home, replace_file
from blindtune.privacy.ledger import read_journal

Text = str | Sequence[str]


@dataclass(frozen=True)
class EarlierRun:
    """An earlier run that shares texts with the current one.

    Attributes:
        run: the run's id.
        mu: μ of one operator's whole view of the run; the run's whole budget if its journal is lost, and infinite for a
            run that sent adapters in the clear.
        shared: number of texts that both runs have.
    """

    run: str
    mu: float
    shared: int


def runs_folder() -> Path:
    """Returns the default folder of the records."""
    return home() / "runs"


class LabelHistory:
    """The registered runs of this machine.

    Args:
        home: folder of the records. Default: `$BLINDTUNE_HOME/runs`, or `~/.local/share/blindtune/runs`.
    """

    def __init__(self, home: str | Path | None = None) -> None:
        self.home = runs_folder() if home is None else Path(home).expanduser().absolute()

    def register(self, run: str, budget: float, texts: Iterable[Text]) -> None:
        """Records a run before it sends anything.

        Args:
            run: the run's id, which is also the id in its ledger, if it has one.
            budget: μ that the run may spend; infinite if nothing bounds what it reveals.
            texts: the run's texts, as strings or pairs of strings.
        Raises:
            CheckpointError: the record can't be written.
        """
        record = {"run": run, "budget": None if math.isinf(budget) else budget}
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            path, hashes = self.home / f"{run}.texts", _hashes(texts)
            if path.exists():  # the run was resumed with other texts
                hashes = np.union1d(hashes, np.frombuffer(path.read_bytes(), dtype="<u8"))
            replace_file(path, hashes.tobytes(), PRIVATE)
            replace_file(self.home / f"{run}.json", (json.dumps(record) + "\n").encode(), PRIVATE)
        except OSError as error:
            raise CheckpointError(
                f"{self.home} can't be written: {error}.",
                remedy=f"It records what runs on the same labels reveal. Set {HOME_VARIABLE} to a writable folder.",
            ) from None

    def earlier(self, texts: Iterable[Text], *, but: str = "") -> list[EarlierRun]:
        """Returns all registered runs that share a text with `texts`, except the run with the id `but`."""
        mine = _hashes(texts)
        runs: list[EarlierRun] = []
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
                runs.append(EarlierRun(record["run"], mu, shared))
        return runs

    def _spent(self, run: str, budget: float) -> float:
        """Returns the μ that a run has spent according to its journal; its whole budget if there is no journal."""
        try:
            mu = read_journal(self.home / f"{run}.jsonl").guarantee().mu
        except (OSError, CheckpointError):
            return budget
        return budget if mu is None else mu


def total_mu(runs: Iterable[EarlierRun], budget: float) -> float:
    """Returns μ of a run with this budget and all earlier runs together."""
    return math.sqrt(budget**2 + sum(run.mu**2 for run in runs))


def _hashes(texts: Iterable[Text]) -> NDArray[np.uint64]:
    """Returns the first 64 bits of each text's SHA-256, sorted and without duplicates."""
    digests = b"".join(
        hashlib.sha256("\x1f".join([text] if isinstance(text, str) else text).encode()).digest()[:8] for text in texts
    )
    return np.unique(np.frombuffer(digests, dtype="<u8"))
