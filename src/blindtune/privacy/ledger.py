"""The ledger of a run counts what each operator receives and what that can reveal, before it is sent.

Every message that depends on labels adds a public allowance, and has a secret cost: what it really reveals. Both are in
units of |a|² / σ² (`blindtune.privacy.accountant`). The ledger is the filter of the guarantee:

    Σ cost ≤ Σ allowance ≤ A        at every operator, at all times, for any labels

The left inequality holds because senders scale down a message that would cost more than `room`; operators can't see
that. (If copies of a run continued separately and are merged, each copy may have spent the same saved room. Then there
is no room left, and zeros are sent.) The right inequality depends on the number of messages alone, and so on no label:
`check` refuses a message that would violate it. No message is omitted because it equals an earlier one, since whether
two secrets are equal depends on labels. Every message has a random salt of its own, from which its noise is derived, so
no noise is used for two messages, even if a run has several copies.

Journals preserve the ledger when the process ends: each message is one line, which is on the disk (fsync) before the
message is sent. A line that a crash left incomplete belongs to a message that was never sent. A run has one journal in
each folder that it is saved in, so that it can be resumed elsewhere, and one in a folder of this machine (`follow`),
which all copies of the run on this machine share. So threads, processes and checkpoints of one run share one account.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any

from filelock import FileLock

from blindtune.errors import BudgetSpent
from blindtune.files import PRIVATE
from blindtune.privacy.accountant import DELTA, Guarantee, gaussian_guarantee, mu_of
from blindtune.privacy.journal import (
    FORMAT,
    JOURNAL,
    append_lines,
    journal_state,
    read_journal_of,
    read_lines,
    read_run,
    unused_name,
    writing,
)

TOLERANCE = 1e-9


def new_id() -> str:
    """Returns 128 random bits in hexadecimal."""
    return secrets.token_hex(16)


@dataclass(frozen=True)
class Message:
    """A message to several operators, as the ledger counts it.

    Attributes:
        kind: `adapter`, `share`, or `check` (label-free).
        costs: operator -> |a|² / σ² of what this operator is really sent; secret.
        allowance: what the message adds to the allowance of each of these operators; public.
        id: the salt from which the message's noise is derived; unique.
    """

    kind: str
    costs: dict[str, float]
    allowance: float = 0.0
    id: str = field(default_factory=new_id)


@dataclass
class _Account:
    """The allowances and costs of all messages to one operator, summed, and the number of messages of each kind."""

    allowance: float = 0.0
    cost: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter[str])


class Ledger:
    """Counts the messages to each operator. An operator's name is its address, a space, and the server's id.

    Args:
        limit: A, the largest sum of allowances at any operator; infinite without a budget.
    """

    def __init__(self, limit: float = math.inf) -> None:
        self.limit = limit
        self.run = new_id()
        self.compromised = False
        """Whether one operator received messages that must go to different operators. Then nothing is private."""
        self.journals: list[Path] = []
        """The journals in the run's folders."""
        self._home: Path | None = None
        self._lock = RLock()
        self._file_lock_held = False
        self._journal_state: tuple[int, int, bytes] | None = None
        """State of this machine's journal when it was last read or written."""
        self._accounts: dict[str, _Account] = {}
        self._operators: frozenset[str] | None = None
        """The operators of the process that wrote the last lines; None if a later name may stand for any operator."""
        self._pools: list[frozenset[str]] = []
        """The sets of operators that processes have enlisted."""
        self._lines: dict[str, dict[str, Any]] = {}
        """All counted lines by id, in the order in which they were counted."""

    @contextmanager
    def exclusive(self) -> Generator[None]:
        """Locks the run's account on this machine, after reading what other copies of the run have counted.

        Hold this lock from the call of `room` until after `record`. It is reentrant.
        """
        with self._lock:
            path = self._machine_journal
            if path is None or self._file_lock_held:
                yield
                return
            lock = FileLock(path.with_suffix(".lock"), mode=PRIVATE, thread_local=False)
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire()
            self._file_lock_held = True
            try:
                with writing(path):
                    self._refresh(path)
                yield
            finally:
                self._file_lock_held = False
                lock.release()

    def enlist(self, operators: Sequence[str]) -> None:
        """Declares the operators of this process before anything is sent.

        If they differ from the operators before, each new name may be another name of any earlier operator. So all
        accounts, old and new, are raised to the largest allowance and the largest cost of any account.
        """
        with self.exclusive():
            if frozenset(operators) != self._operators:
                self._write([_enlistment(operators)])

    def room(self, operators: Iterable[str], allowance: float) -> float:
        """Returns the largest cost that a message to all these operators may have if it adds this allowance."""
        accounts = [self._account(operator) for operator in operators]
        return min(account.allowance + allowance - account.cost for account in accounts)

    def check(self, operators: Iterable[str], allowance: float) -> None:
        """Raises `BudgetSpent` if a message with this allowance would exceed the limit at one of the operators."""
        most = max(self._account(operator).allowance for operator in operators) + allowance
        if most > self.limit * (1 + TOLERANCE):
            raise BudgetSpent(
                f"The next message would take one operator to μ = {mu_of(most):.4f}; the budget is "
                f"{mu_of(self.limit):.4g}.",
                remedy="The model keeps what it has learned. Plan more steps (steps, batch_size) or another budget "
                "(max_mu) before a run begins.",
            )

    def record(self, message: Message) -> None:
        """Counts a message and writes it to all journals. Call this before the message is sent.

        Raises:
            BudgetSpent: the limit would be exceeded.
            ValueError: the message costs more than there is room for.
            CheckpointError: a journal can't be written. The message must not be sent then.
        """
        with self.exclusive():
            self.check(message.costs, message.allowance)
            for operator, cost in message.costs.items():
                # copies of a run may each have spent the room that they shared: room is negative then, and costs are 0
                if cost > max(0.0, self.room([operator], message.allowance)) + TOLERANCE:
                    raise ValueError(f"A message costs {cost}, more than there is room for.")
            self._write([asdict(message)])

    def compromise(self) -> None:
        """Records that one operator is about to receive messages that must go to different operators."""
        with self.exclusive():
            if not self.compromised:
                self._write([{"id": new_id(), "compromised": True}])

    def guarantee(self, delta: float = DELTA) -> Guarantee:
        """Returns the bounds for all messages so far, at the operator with the largest allowance.

        They are computed from allowances, which are public.
        """
        return gaussian_guarantee(math.inf if self.compromised else mu_of(self.allowance()), delta)

    def allowance(self) -> float:
        """Returns the sum of allowances so far, at the operator where it is largest."""
        return max((account.allowance for account in self._accounts.values()), default=0.0)

    def used(self) -> float:
        """Returns the sum of costs as a fraction of the sum of allowances, at the operator where it is largest."""
        return max((a.cost / a.allowance for a in self._accounts.values() if a.allowance > 0), default=0.0)

    def seen(self, url: str) -> Counter[str]:
        """Returns the number of messages to an address, by kind."""
        kinds = Counter[str]()
        for name, account in self._accounts.items():
            if name.split(" ")[0] == url:
                kinds += account.kinds
        return kinds

    def messages(self, kind: str) -> int:
        """Returns the largest number of messages of this kind that any one operator has been sent."""
        return max((account.kinds[kind] for account in self._accounts.values()), default=0)

    def follow(self, folder: Path) -> None:
        """Shares one account with all copies of this run on this machine, by a common journal in this folder."""
        self._home = folder

    def attach(self, folder: str | Path) -> None:
        """Starts a journal in this folder that has all messages counted so far and gets all further ones.

        A journal of another run in this folder is renamed, with that run's id in its name. A journal of the same run,
        such as that of an earlier checkpoint, is merged.

        Raises:
            CheckpointError: the journal can't be written.
        """
        path = Path(folder).resolve() / JOURNAL
        with self.exclusive():
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                other = read_run(path)
                if path in self.journals and other == self.run:
                    return
                if path.exists() and other != self.run:
                    path.rename(unused_name(path, other or "empty"))
            if path not in self.journals:
                self.journals.append(path)
            self._synchronize(path)

    def resume(self, folder: str | Path, run: str | None = None) -> None:
        """Restores the ledger from the journal in this folder, and from the journal that copies of the run share here.

        Further messages are written to both.

        Args:
            run: id of the run that the journal must belong to; None accepts any run.
        Raises:
            CheckpointError: there is no journal, it is damaged, or it belongs to another run.
        """
        path = Path(folder).resolve() / JOURNAL
        lines = read_journal_of(path, run)
        self.run = lines[0]["run"]
        # if another run has used the folder since, `attach` has renamed this run's journal
        for renamed in sorted(path.parent.glob(f"{path.stem}-{self.run}*.jsonl")):
            lines += read_lines(renamed)[1:]
        if path not in self.journals:
            self.journals.append(path)
        with self.exclusive():
            self.load(lines)
            self._synchronize(path)

    def load(self, lines: Iterable[dict[str, Any]]) -> None:
        """Counts the lines of a journal that were not counted before."""
        for line in lines:
            if "run" in line:
                self.run = line["run"]
            elif line["id"] not in self._lines:
                self._lines[line["id"]] = line
                self._apply(line)

    @property
    def _machine_journal(self) -> Path | None:
        """The journal that all copies of the run on this machine share; None without `follow`."""
        return None if self._home is None else self._home / f"{self.run}.jsonl"

    def _refresh(self, path: Path) -> None:
        """Counts the messages that other copies of the run on this machine have recorded since the last call."""
        if journal_state(path) != self._journal_state:
            self._synchronize()

    def _synchronize(self, first: Path | None = None) -> None:
        """Merges all journals and this process's account, so that all have the same lines; `first` is merged first."""
        machine = self._machine_journal
        paths = [path for path in (first, machine, *self.journals) if path is not None]
        for path in [*paths, *paths]:  # the second pass gives each journal the lines of those after it
            with writing(path):
                if self._is_writable(path):
                    self._merge(path)
        if machine is not None:
            self._journal_state = journal_state(machine)

    def _is_writable(self, path: Path) -> bool:
        """Returns whether this run may write to a journal, which need not exist yet.

        A journal whose folder was removed, or that now belongs to another run, is no longer written.
        """
        if self._home is None or path == self._machine_journal:
            return True
        if path.parent.is_dir() and read_run(path) in (self.run, None):
            return True
        if path in self.journals:
            self.journals.remove(path)
        return False

    def _merge(self, path: Path) -> None:
        """Counts the lines of a journal that this ledger lacks, and appends to it the lines that it lacks."""
        lines = read_lines(path) if path.exists() else []
        ours, theirs = list(self._lines), [line["id"] for line in lines[1:]]
        if ours == theirs and lines:
            return
        in_file = set(theirs)
        missing = [self._lines[name] for name in ours if name not in in_file]
        foreign = [line for line in lines[1:] if line["id"] not in self._lines]
        merge_lines: list[dict[str, Any]] = []
        # When two histories are merged, an operator's name in one may be another name of any operator in the other. So
        # each history is counted on top of the largest account of the other: in memory theirs on ours, in the file ours
        # on theirs.
        if _has_messages(missing) and ours[: len(theirs)] != theirs:
            merge_lines = [_merge_line(_operators_in(lines))]
        if _has_messages(foreign) and theirs[: len(ours)] != ours:
            self.load([_merge_line(self._accounts)])
        self.load([*lines, *merge_lines])
        header = [] if lines else [{"format": FORMAT, "run": self.run}]
        append_lines(path, [*header, *merge_lines, *missing])

    def _account(self, operator: str) -> _Account:
        """Returns an operator's account. Raises `ValueError` if the operator was not enlisted."""
        if operator not in self._accounts:
            raise ValueError(f"{operator} was not enlisted.")
        return self._accounts[operator]

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        """Appends lines to all journals, then counts them."""
        machine = self._machine_journal
        for path in [*([] if machine is None else [machine]), *self.journals]:
            with writing(path):
                if not self._is_writable(path):
                    continue
                if read_run(path) is None:  # the journal is new, or was deleted
                    self._merge(path)
                append_lines(path, lines)
        if machine is not None:
            self._journal_state = journal_state(machine)
        self.load(lines)

    def _apply(self, line: dict[str, Any]) -> None:
        """Updates the accounts by one line of a journal."""
        if "compromised" in line:
            self.compromised = True
        elif "operators" in line:
            self._enlist(frozenset(line["operators"]))
            if line.get("merge"):
                self._operators = None  # the next line's names may be other names of any of these operators
            else:
                self._pools.append(frozenset(line["operators"]))
        else:
            message = Message(**line)
            names = frozenset(message.costs)
            if self._operators is None or not names <= self._operators:  # a line of another process
                self._enlist(next((pool for pool in self._pools if names <= pool), names))
            for operator, cost in message.costs.items():
                account = self._account(operator)
                account.allowance += message.allowance
                account.cost += cost
                account.kinds[message.kind] += 1

    def _enlist(self, operators: frozenset[str]) -> None:
        """Opens accounts for these operators and raises all accounts to the largest allowance and cost."""
        accounts = self._accounts.values()
        allowance = max((account.allowance for account in accounts), default=0.0)
        cost = max((account.cost for account in accounts), default=0.0)
        for operator in operators:
            self._accounts.setdefault(operator, _Account())
        for account in self._accounts.values():
            account.allowance, account.cost = allowance, cost
        self._operators = operators


def _enlistment(operators: Iterable[str], **more: Any) -> dict[str, Any]:
    """Returns a line that declares the operators of a process."""
    return {
        "operators": sorted(operators),
        **more,
        "id": new_id(),
    }  # the id is last, so that `journal_state` includes it


def _merge_line(operators: Iterable[str]) -> dict[str, Any]:
    """Returns a line that separates two merged histories. It raises the accounts of all operators of the first."""
    return _enlistment(operators, merge=True)


def _has_messages(lines: Iterable[dict[str, Any]]) -> bool:
    """Returns whether any of these lines is a message."""
    return any("kind" in line for line in lines)


def _operators_in(lines: Iterable[dict[str, Any]]) -> set[str]:
    """Returns all operators that these lines declare."""
    return {name for line in lines for name in line.get("operators", ())}


def read_journal(path: Path) -> Ledger:
    """Returns a ledger with the counts of a journal, for reading only: it isn't attached to the journal.

    Raises:
        OSError: the journal can't be read.
        CheckpointError: the journal is damaged.
    """
    ledger = Ledger()
    ledger.load(read_lines(path))
    return ledger
