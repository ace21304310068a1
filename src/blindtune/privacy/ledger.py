"""The ledger of a run: what each operator has been sent, and what that can tell; written before anything is sent.

Every message that depends on labels has a public number, brings a public allowance, and costs what it really tells
(allowance and cost are |a|² / σ², see `blindtune.privacy.accountant`). The ledger is the filter of the guarantee:

    Σ cost ≤ Σ allowance ≤ A        at every operator, at every moment, for any labels

The left side holds because senders shrink a message that would cost more than `room`; nothing of that is visible. The
right side is a matter of counting messages, which depends on no label: `check` refuses the one that would exceed it.
No message is left out because it equals an earlier one: whether two secrets are equal depends on labels.

A journal makes the ledger outlive the process: each message is one line, which is on the disk (fsync) before the
message leaves. A line that a crash cut off was never sent.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from blindtune.errors import BudgetSpent, CheckpointError
from blindtune.files import PRIVATE, sync_folder
from blindtune.privacy.accountant import DELTA, Guarantee, gaussian_guarantee, mu_of

JOURNAL = "ledger.jsonl"
FORMAT = 1
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Message:
    """What is sent to several operators at once.

    Attributes:
        kind: `adapter`, `share`, or `check` (label-free).
        costs: operator -> |a|² / σ² of what it is really sent.
        allowance: what the message brings at each of these operators, public.
        room: what it could have cost at most; with the number it makes the same bytes again.
        content: of an adapter for predictions: a keyed hash of what it was made of. The same adapter is sent as the
            same bytes to the same operators then.
        number: its place among the messages of its kind.
    """

    kind: str
    costs: dict[str, float]
    allowance: float = 0.0
    room: float = 0.0
    content: str = ""
    number: int = 0


@dataclass
class _Account:
    allowance: float = 0.0
    cost: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter[str])


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
        self._numbers = Counter[str]()
        self._predictions: list[Message] = []
        self._operators: frozenset[str] | None = None
        self._lines: list[dict[str, Any]] = []

    def enlist(self, operators: Sequence[str]) -> None:
        """Names the operators of this process, before anything is sent.

        Where they are others than before, an address may be a new name of any operator that there was. So all accounts,
        old and new, are raised to the largest allowance and the largest cost.
        """
        if frozenset(operators) != self._operators:
            self._write([{"operators": list(operators)}])

    def count(self, kind: str) -> int:
        """Messages of a kind so far: the number of the next one."""
        return self._numbers[kind]

    def find_prediction(self, operators: Sequence[str], content: str) -> Message | None:
        """The adapter with this content that these operators have been sent to predict, if they have."""
        wanted = (list(operators), content)
        return next((m for m in self._predictions if (list(m.costs), m.content) == wanted), None)

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

    def record(self, message: Message) -> Message:
        """Writes a message down, before it is sent; returns it with its number.

        Raises:
            BudgetSpent: the limit would be exceeded.
            ValueError: it costs more than there is room for.
            CheckpointError: the journal can't be written; nothing must be sent then.
        """
        self.check(message.costs, message.allowance)
        for operator, cost in message.costs.items():
            if cost > self.room([operator], message.allowance) + TOLERANCE:
                raise ValueError(f"A message costs {cost}, more than there is room for.")
        numbered = replace(message, number=self.count(message.kind))
        self._write([asdict(numbered)])
        return numbered

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

    def seen(self, operator: str) -> Counter[str]:
        """Messages that an operator has seen, by kind."""
        return Counter(self._account(operator).kinds)

    def messages(self, kind: str) -> int:
        """Messages of a kind that one operator has seen, where they are most."""
        return max((account.kinds[kind] for account in self._accounts.values()), default=0)

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
        """Goes on from the journal of this folder, and in it.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        path = Path(folder).resolve() / JOURNAL
        if not path.is_file():
            raise CheckpointError(
                f"There is no {path}, so nobody knows what operators have seen of this run.",
                remedy="Put the file back. Without it, count the whole budget of the run as spent, and train anew.",
            )
        self.load(read_lines(path, mend=True))
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
        if operator not in self._accounts:
            raise ValueError(f"{operator} was not enlisted.")
        return self._accounts[operator]

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        """To the journals first, then into memory."""
        for path in self.journals:
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
        elif "operators" in line:
            self._enlist(line["operators"])
        else:
            message = Message(**line)
            self._numbers[message.kind] = max(self._numbers[message.kind], message.number + 1)
            if message.content:
                self._predictions.append(message)
            for operator, cost in message.costs.items():
                account = self._account(operator)
                account.allowance += message.allowance
                account.cost += cost
                account.kinds[message.kind] += 1

    def _enlist(self, operators: Sequence[str]) -> None:
        known = self._accounts.values()
        allowance = max((account.allowance for account in known), default=0.0)
        cost = max((account.cost for account in known), default=0.0)
        for operator in operators:
            self._accounts.setdefault(operator, _Account())
        for account in self._accounts.values():
            account.allowance, account.cost = allowance, cost
        self._operators = frozenset(operators)


def append_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Adds lines to a journal, for its owner's eyes alone; they are on the disk when this returns, or none of them."""
    new = not path.exists()
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE)
    try:
        end = os.fstat(descriptor).st_size
        if os.write(descriptor, content) != len(content):
            os.ftruncate(descriptor, end)
            raise OSError("the disk is full")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if new:
        sync_folder(path.parent)


def read_lines(path: Path, *, mend: bool = False) -> list[dict[str, Any]]:
    """The complete lines of a journal, without what a crash left of a last one.

    Args:
        mend: cuts that off in the file too.
    Raises:
        CheckpointError: a damaged journal, or one of another version.
    """
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if mend and end != len(content):
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
