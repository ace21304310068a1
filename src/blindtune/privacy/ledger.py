"""The ledger of a run: what each operator has been sent, and what that can tell; written before anything is sent.

Every message that depends on labels brings a public allowance and costs what it really tells (both are |a|² / σ², see
`blindtune.privacy.accountant`). The ledger is the filter of the guarantee:

    Σ cost ≤ Σ allowance ≤ A        at every operator, at every moment, for any labels

The left side holds because senders shrink a message that would cost more than `room`; nothing of that is visible. The
right side is a matter of counting messages, which depends on no label: `open` refuses the one that would exceed it.

A journal makes the ledger outlive the process: each line is on the disk (fsync) before the message leaves. A line that
a crash cut off was never sent.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blindtune.errors import BudgetSpent, CheckpointError
from blindtune.files import PRIVATE, sync_folder
from blindtune.privacy.accountant import DELTA, Guarantee, gaussian_guarantee, mu_of

JOURNAL = "ledger.jsonl"
FORMAT = 1
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Entry:
    """One message to one operator.

    Attributes:
        kind: `adapter`, `share`, or `check` (label-free).
        message: what identifies it; equal ids are equal bytes, which count once.
        allowance: what it brings, public.
        cost: |a|² / σ² of what is really sent.
        factor: by which its sender shrank it, so that a repetition is the same.
        update: of an adapter: what it was made from; the same for all operators.
    """

    operator: str
    kind: str
    message: str
    allowance: float
    cost: float
    factor: float = 1.0
    update: str = ""


@dataclass
class _Account:
    allowance: float = 0.0
    cost: float = 0.0
    entries: dict[str, Entry] = field(default_factory=dict[str, Entry])


class Ledger:
    """Counts messages for each operator, by its address.

    Args:
        limit: A, the sum of allowances that no operator exceeds; infinite without a budget.
    """

    def __init__(self, limit: float = math.inf) -> None:
        self.limit = limit
        self.run = secrets.token_hex(16)
        self.compromised = False
        """Whether messages that must be kept apart went to one operator: then nothing is private."""
        self.journals: list[Path] = []
        self._accounts: dict[str, _Account] = {}
        self._order: dict[str, int] = {}
        self._lines: list[dict[str, Any]] = []

    def enlist(self, operators: Sequence[str]) -> None:
        """Names the operators of this process.

        An address that is new in a run that had others may be another name of one of them: it inherits the largest
        account.
        """
        unknown = [operator for operator in operators if operator not in self._accounts]
        if not unknown:
            return
        inherited = max(self._accounts.values(), key=lambda account: account.allowance, default=_Account())
        lines = [
            {"operator": operator, "allowance": inherited.allowance, "cost": inherited.cost} for operator in unknown
        ]
        self._write(lines)

    def find(self, operators: Iterable[str], message: str) -> Entry | None:
        """The entry of a message that all these operators have been sent already."""
        found = [self._account(operator).entries.get(message) for operator in operators]
        return found[0] if found and all(found) else None

    def position(self, update: str) -> int | None:
        """The place of an update in the order in which they were first sent."""
        return self._order.get(update)

    @property
    def last(self) -> int:
        """The place of the last update; -1 before the first."""
        return len(self._order) - 1

    def room(self, operators: Iterable[str], allowance: float) -> float:
        """What a message to all these operators may cost if it brings this allowance."""
        accounts = [self._account(operator) for operator in operators]
        return min(account.allowance + allowance - account.cost for account in accounts)

    def check(self, operators: Iterable[str], allowance: float) -> None:
        """Raises `BudgetSpent` if a message with this allowance would exceed the limit at one of the operators."""
        most = max(self._account(operator).allowance for operator in operators) + allowance
        if most > self.limit * (1 + TOLERANCE):
            raise BudgetSpent(
                f"The next message would take one operator to μ = {mu_of(most):.4f}; the budget is "
                f"{mu_of(self.limit):.4g}.",
                remedy="What was learned stays. Plan more steps (steps, batch_size) or another budget (max_mu) before "
                "a run begins.",
            )

    def record(self, entries: Sequence[Entry]) -> None:
        """Writes messages down, before they are sent; those that an operator has had already don't count again.

        Raises:
            BudgetSpent: the limit would be exceeded.
            ValueError: a message costs more than there is room for.
            CheckpointError: the journal can't be written; nothing must be sent then.
        """
        new = [e for e in entries if e.message not in self._account(e.operator).entries]
        for entry in new:
            self.check([entry.operator], entry.allowance)
            if entry.cost > self.room([entry.operator], entry.allowance) + TOLERANCE:
                raise ValueError(f"A message costs {entry.cost}, more than there is room for.")
        self._write([asdict(entry) for entry in new])

    def compromise(self) -> None:
        """Messages that must be kept apart are about to meet at one operator."""
        if not self.compromised:
            self._write([{"compromised": True}])

    def guarantee(self, delta: float = DELTA) -> Guarantee:
        """Of all that was sent so far, at the operator where it is largest: from allowances, which are public."""
        return gaussian_guarantee(math.inf if self.compromised else mu_of(self.allowance()), delta)

    def allowance(self) -> float:
        """The allowances that messages have brought, at the operator where they are largest."""
        return max((account.allowance for account in self._accounts.values()), default=0.0)

    def used(self) -> float:
        """Part of the allowances that was needed, at the operator where it is largest."""
        return max((a.cost / a.allowance for a in self._accounts.values() if a.allowance > 0), default=0.0)

    def messages(self, kind: str) -> int:
        """Different messages of a kind that one operator has seen, where they are most."""
        counts = [sum(entry.kind == kind for entry in a.entries.values()) for a in self._accounts.values()]
        return max(counts, default=0)

    def attach(self, folder: str | Path) -> None:
        """Keeps a journal in this folder from now on, with all that has been counted so far.

        The journal of another run in this folder is set aside under that run's name.

        Raises:
            CheckpointError: it can't be written.
        """
        path = Path(folder).resolve() / JOURNAL
        if path in self.journals:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                path.rename(path.with_name(f"ledger-{read_run(path) or 'empty'}.jsonl"))
            append_lines(path, [{"format": FORMAT, "run": self.run}, *self._lines])
        except OSError as error:
            raise unwritable(path, error) from None
        self.journals.append(path)

    def resume(self, folder: str | Path) -> None:
        """Goes on from the journal of this folder, if it has one, and in it.

        Raises:
            CheckpointError: a damaged journal.
        """
        path = Path(folder).resolve() / JOURNAL
        if not path.exists():
            return
        self.load(read_lines(path))
        self.journals.append(path)

    def load(self, lines: Iterable[dict[str, Any]]) -> None:
        """Counts the lines of a journal."""
        for line in lines:
            if "run" in line:
                self.run = line["run"]
            else:
                self._lines.append(line)
                self._apply(line)

    def _account(self, operator: str) -> _Account:
        return self._accounts.setdefault(operator, _Account())

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        """To the journals first, then into memory."""
        for path in self.journals if lines else ():
            try:
                append_lines(path, lines)
            except OSError as error:
                raise unwritable(path, error) from None
        self._lines.extend(lines)
        for line in lines:
            self._apply(line)

    def _apply(self, line: dict[str, Any]) -> None:
        if "compromised" in line:
            self.compromised = True
        elif "message" in line:
            entry = Entry(**line)
            account = self._account(entry.operator)
            if entry.message not in account.entries:
                account.entries[entry.message] = entry
                account.allowance += entry.allowance
                account.cost += entry.cost
                if entry.update:
                    self._order.setdefault(entry.update, len(self._order))
        elif line["operator"] not in self._accounts:
            self._accounts[line["operator"]] = _Account(line["allowance"], line["cost"])


def append_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Adds lines to a journal, for its owner's eyes alone; they are on the disk when this returns."""
    new = not path.exists()
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE)
    try:
        written = os.write(descriptor, content)
        if written != len(content):
            raise OSError(f"{written} of {len(content)} bytes were written")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if new:
        sync_folder(path.parent)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a journal; what a crash left of a last one is cut off.

    Raises:
        CheckpointError: a damaged journal, or one of another version.
    """
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end != len(content):
        os.truncate(path, end)
    try:
        lines: list[dict[str, Any]] = [json.loads(line) for line in content[:end].splitlines()]
        if lines and lines[0]["format"] != FORMAT:
            raise KeyError("format")
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{path} is damaged, so nobody knows any more what operators have seen.",
            remedy="Use another copy of it. Without one, count the whole budget of that run as spent.",
        ) from None
    return lines


def read_journal(path: Path) -> Ledger:
    """What a journal has counted, to look at.

    Raises:
        OSError: it can't be read.
        CheckpointError: it is damaged.
    """
    ledger = Ledger()
    ledger.load(read_lines(path))
    return ledger


def read_run(path: Path) -> str | None:
    """The run that a journal belongs to; None if it is empty."""
    lines = read_lines(path)
    return str(lines[0]["run"]) if lines else None


def unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} can't be written: {error}.",
        remedy="Make it writable: it counts what operators have seen, before they see it.",
    )
