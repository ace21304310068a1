"""The ledger of a run: what each operator has been sent, and what that can tell; written before anything is sent.

Every message that depends on labels brings a public allowance, and costs what it really tells (allowance and cost are
|a|² / σ², see `blindtune.privacy.accountant`). The ledger is the filter of the guarantee:

    Σ cost ≤ Σ allowance ≤ A        at every operator, at every moment, for any labels

The left side holds because senders shrink a message that would cost more than `room`; nothing of that is visible.
(Where copies of a run went on apart and meet, each may have used what was saved before: then zeros are sent.) The
right side is a matter of counting messages, which depends on no label: `check` refuses the one that would exceed it.
No message is left out because it equals an earlier one: whether two secrets are equal depends on labels. Every message
has a random salt of its own, from which its noise follows, so no noise is used for two messages, whatever copies of a
run there are.

Journals make the ledger outlive the process: each message is one line, which is on the disk (fsync) before the message
leaves. A line that a crash cut off was never sent. A run has one journal in each folder that it is saved in, so that it
can go on elsewhere, and one in a folder of this machine (`follow`), which all copies of the run on this machine share:
threads, processes, and checkpoints that were saved beside each other are one account.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any

from filelock import FileLock

from blindtune.errors import BudgetSpent, CheckpointError
from blindtune.files import PRIVATE, sync_folder
from blindtune.privacy.accountant import DELTA, Guarantee, gaussian_guarantee, mu_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

JOURNAL = "ledger.jsonl"
FORMAT = 4
TOLERANCE = 1e-9
TAIL = 256
"""Bytes at the end of a journal by which a change is noticed: more than the last line's name."""


def new_id() -> str:
    """128 random bits, in hex."""
    return secrets.token_hex(16)


@dataclass(frozen=True)
class Message:
    """What is sent to several operators at once.

    Attributes:
        kind: `adapter`, `share`, or `check` (label-free).
        costs: operator -> |a|² / σ² of what it is really sent.
        allowance: what the message brings at each of these operators, public.
        id: the salt of its noise; no two messages have the same.
    """

    kind: str
    costs: dict[str, float]
    allowance: float = 0.0
    id: str = field(default_factory=new_id)


@dataclass
class _Account:
    allowance: float = 0.0
    cost: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter[str])


class Ledger:
    """Counts messages for each operator, by its name: its address, and after a space what the server calls itself.

    Args:
        limit: A, the sum of allowances that no operator exceeds; infinite without a budget.
    """

    def __init__(self, limit: float = math.inf) -> None:
        self.limit = limit
        self.run = new_id()
        self.compromised = False
        """Whether messages that must be kept apart went to one operator: then nothing is private."""
        self.journals: list[Path] = []
        """In the run's folders."""
        self._home: Path | None = None
        self._lock = RLock()
        self._held = False
        self._read: tuple[int, int, bytes] | None = None
        """State of this machine's journal up to where it is known."""
        self._accounts: dict[str, _Account] = {}
        self._operators: frozenset[str] | None = None
        """Those of the last lines."""
        self._pools: list[frozenset[str]] = []
        """Those that processes have named together."""
        self._lines: dict[str, dict[str, Any]] = {}

    @contextmanager
    def exclusive(self) -> Generator[None]:
        """Nothing else of this machine counts messages of this run meanwhile, and all that was counted is known.

        From looking at `room` to `record`, hold this. It can be held several times by one thread.
        """
        with self._lock:
            path = self._machine_journal
            if path is None or self._held:
                yield
                return
            lock = FileLock(path.with_suffix(".lock"), mode=PRIVATE, thread_local=False)
            with _writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire()
            self._held = True
            try:
                with _writing(path):
                    self._refresh(path)
                yield
            finally:
                self._held = False
                lock.release()

    def enlist(self, operators: Sequence[str]) -> None:
        """Names the operators of this process, before anything is sent.

        Where they are others than before, a name may be a new one of any operator that there was. So all accounts, old
        and new, are raised to the largest allowance and the largest cost.
        """
        with self.exclusive():
            if frozenset(operators) != self._operators:
                self._write([_enlisting(operators)])

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

    def record(self, message: Message) -> None:
        """Writes a message down, before it is sent.

        Raises:
            BudgetSpent: the limit would be exceeded.
            ValueError: it costs more than there is room for.
            CheckpointError: the journal can't be written; nothing must be sent then.
        """
        with self.exclusive():
            self.check(message.costs, message.allowance)
            for operator, cost in message.costs.items():
                # what copies of a run saved may have been spent by each: then there is no room, and zeros are sent
                if cost > max(0.0, self.room([operator], message.allowance)) + TOLERANCE:
                    raise ValueError(f"A message costs {cost}, more than there is room for.")
            self._write([asdict(message)])

    def compromise(self) -> None:
        """Messages that must be kept apart are about to meet at one operator."""
        with self.exclusive():
            if not self.compromised:
                self._write([{"id": new_id(), "compromised": True}])

    def guarantee(self, delta: float = DELTA) -> Guarantee:
        """Of all that was sent so far, at the operator where it is largest: from allowances, which are public."""
        return gaussian_guarantee(math.inf if self.compromised else mu_of(self.allowance()), delta)

    def allowance(self) -> float:
        """The allowances that messages have brought, at the operator where they are largest."""
        return max((account.allowance for account in self._accounts.values()), default=0.0)

    def used(self) -> float:
        """Part of the allowances that was needed, at the operator where it is largest."""
        return max((a.cost / a.allowance for a in self._accounts.values() if a.allowance > 0), default=0.0)

    def seen(self, url: str) -> Counter[str]:
        """Messages that an address has been sent, by kind."""
        found = Counter[str]()
        for name, account in self._accounts.items():
            if name.split(" ")[0] == url:
                found += account.kinds
        return found

    def messages(self, kind: str) -> int:
        """Messages of a kind that one operator has been sent, where they are most."""
        return max((account.kinds[kind] for account in self._accounts.values()), default=0)

    def follow(self, folder: Path) -> None:
        """Shares one account with all copies of this run on this machine, whose journals are in this folder."""
        self._home = folder

    def attach(self, folder: str | Path) -> None:
        """Keeps a journal in this folder from now on, with all that has been counted so far.

        The journal of another run in this folder is set aside under that run's name. What one of the same run has
        counted, such as that of an earlier checkpoint, is taken over.

        Raises:
            CheckpointError: it can't be written.
        """
        path = Path(folder).resolve() / JOURNAL
        with self.exclusive():
            with _writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                other = read_run(path)
                if path in self.journals and other == self.run:
                    return
                if path.exists() and other != self.run:
                    path.rename(_aside(path, other or "empty"))
            if path not in self.journals:
                self.journals.append(path)
            self._share(path)

    def resume(self, folder: str | Path, run: str | None = None) -> None:
        """Goes on from the journal of this folder, and in it; with all that copies of the run have counted here.

        Args:
            run: whose journal it must be; any if None.
        Raises:
            CheckpointError: there is none, it is damaged, or of another run.
        """
        path = Path(folder).resolve() / JOURNAL
        lines = read_journal_of(path, run)
        self.run = lines[0]["run"]
        for aside in sorted(path.parent.glob(f"{path.stem}-{self.run}*.jsonl")):  # of before another run came and went
            lines += read_lines(aside)[1:]
        if path not in self.journals:
            self.journals.append(path)
        with self.exclusive():
            self.load(lines)
            self._share(path)

    def load(self, lines: Iterable[dict[str, Any]]) -> None:
        """Counts the lines of a journal."""
        for line in lines:
            if "run" in line:
                self.run = line["run"]
            elif line["id"] not in self._lines:
                self._lines[line["id"]] = line
                self._apply(line)

    @property
    def _machine_journal(self) -> Path | None:
        return None if self._home is None else self._home / f"{self.run}.jsonl"

    def _refresh(self, path: Path) -> None:
        """Counts what others of this machine have written down since."""
        if _state(path) != self._read:
            self._share()

    def _share(self, first: Path | None = None) -> None:
        """All journals, and this process, take over from each other what they have, beginning with one of them."""
        machine = self._machine_journal
        paths = [path for path in (first, machine, *self.journals) if path is not None]
        for path in [*paths, *paths]:  # the second time, those before take over from those behind
            with _writing(path):
                if self._holds(path):
                    self._join(path)
        if machine is not None:
            self._read = _state(machine)

    def _holds(self, path: Path) -> bool:
        """Whether a journal is there, or can be begun. One that somebody took away, or took over, is given up."""
        if self._home is None or path == self._machine_journal:
            return True
        if path.parent.is_dir() and read_run(path) in (self.run, None):
            return True
        if path in self.journals:
            self.journals.remove(path)
        return False

    def _join(self, path: Path) -> None:
        """Takes over what a journal has, and adds to it what it lacks."""
        lines = read_lines(path) if path.exists() else []
        ours, theirs = list(self._lines), [line["id"] for line in lines[1:]]
        if ours == theirs and lines:
            return
        known = set(theirs)
        missing = [self._lines[name] for name in ours if name not in known]
        foreign = [line for line in lines[1:] if line["id"] not in self._lines]
        between: list[dict[str, Any]] = []
        # Where two histories meet, a name of one may be a new one of any operator of the other. So each is counted on
        # top of the largest account of the other: here theirs on ours, in the file ours on theirs.
        if _messages(missing) and ours[: len(theirs)] != theirs:
            between = [_meeting(_named(lines))]
        if _messages(foreign) and theirs[: len(ours)] != ours:
            self.load([_meeting(self._accounts)])
        self.load([*lines, *between])
        header = [] if lines else [{"format": FORMAT, "run": self.run}]
        append_lines(path, [*header, *between, *missing])

    def _account(self, operator: str) -> _Account:
        if operator not in self._accounts:
            raise ValueError(f"{operator} was not enlisted.")
        return self._accounts[operator]

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        """To the journals first, then into memory."""
        machine = self._machine_journal
        for path in [*([] if machine is None else [machine]), *self.journals]:
            with _writing(path):
                if not self._holds(path):
                    continue
                if read_run(path) is None:  # new, or somebody took it away
                    self._join(path)
                append_lines(path, lines)
        if machine is not None:
            self._read = _state(machine)
        self.load(lines)

    def _apply(self, line: dict[str, Any]) -> None:
        if "compromised" in line:
            self.compromised = True
        elif "operators" in line:
            self._enlist(frozenset(line["operators"]))
            if line.get("meeting"):
                self._operators = None  # those who come next may be any of them
            else:
                self._pools.append(frozenset(line["operators"]))
        else:
            message = Message(**line)
            names = frozenset(message.costs)
            if self._operators is None or not names <= self._operators:  # of another process, between this one's lines
                self._enlist(next((pool for pool in self._pools if names <= pool), names))
            for operator, cost in message.costs.items():
                account = self._account(operator)
                account.allowance += message.allowance
                account.cost += cost
                account.kinds[message.kind] += 1

    def _enlist(self, operators: frozenset[str]) -> None:
        known = self._accounts.values()
        allowance = max((account.allowance for account in known), default=0.0)
        cost = max((account.cost for account in known), default=0.0)
        for operator in operators:
            self._accounts.setdefault(operator, _Account())
        for account in self._accounts.values():
            account.allowance, account.cost = allowance, cost
        self._operators = operators


def append_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Adds lines to a journal, for its owner's eyes alone; they are on the disk when this returns, or none of them.

    What a crash left of a last line is cut off first.
    """
    if not lines:
        return
    new = not path.exists()
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, PRIVATE)
    try:
        _lock(descriptor)  # copies under several homes may share a folder, and no other lock
        end = _complete(descriptor)
        if os.write(descriptor, content) != len(content):
            os.ftruncate(descriptor, end)
            raise OSError("the disk is full")
        os.fsync(descriptor)
    finally:
        _unlock(descriptor)
        os.close(descriptor)
    if new:
        sync_folder(path.parent)


def _lock(descriptor: int) -> None:
    """Until the file is closed, no other process appends to it; where the system has such locks."""
    if fcntl is not None:
        with suppress(OSError):  # such as network file systems
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def _unlock(descriptor: int) -> None:
    """At once: a process that was forked meanwhile keeps the file open, and with it the lock."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def _complete(descriptor: int) -> int:
    """Cuts a file after its last complete line. Returns its size then."""
    size = os.fstat(descriptor).st_size
    os.lseek(descriptor, 0, os.SEEK_SET)
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(max(0, size - 1))
        if file.read(1) in (b"\n", b""):
            return size
        file.seek(0)
        size = file.read().rfind(b"\n") + 1
    os.ftruncate(descriptor, size)
    return size


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a journal, without what a crash left of a last one.

    Raises:
        CheckpointError: a damaged journal, or one of another version.
    """
    content = path.read_bytes()
    return parse_lines(path, content[: content.rfind(b"\n") + 1])


def parse_lines(path: Path, content: bytes) -> list[dict[str, Any]]:
    """Lines of a journal, from the first one on.

    Raises:
        CheckpointError: a damaged journal, or one of another version.
    """
    try:
        lines: list[dict[str, Any]] = [json.loads(line) for line in content.splitlines()]
        version = lines[0]["format"] if lines else FORMAT
        if any("id" not in line for line in lines[1:]):
            raise KeyError("id")
    except (ValueError, KeyError, TypeError):
        raise damaged(path) from None
    if version != FORMAT:
        raise CheckpointError(
            f"{path} was written by another version.",
            remedy="Count that run's budget as spent, and use another folder.",
        )
    return lines


def read_journal_of(path: Path, run: str | None) -> list[dict[str, Any]]:
    """The lines of a run's journal.

    Args:
        run: whose it must be; any if None.
    Raises:
        CheckpointError: there is none, it is damaged, or of another run.
    """
    back = f" It may be there as {path.stem}-{run}.jsonl." if run else ""
    if not path.is_file():
        raise CheckpointError(
            f"There is no {path}, so nobody knows what operators have seen of this run.",
            remedy=f"Put the file back.{back} Without it, count the whole budget of the run as spent, and train anew.",
        )
    lines = read_lines(path)
    if not lines:
        raise damaged(path)
    if run not in (None, lines[0]["run"]):
        raise CheckpointError(
            f"{path} counts what operators have seen of another run than the one that is saved beside it: a run "
            "was begun in this folder, and broken off before it saved anything.",
            remedy=f"Put the journal of this run back.{back}",
        )
    return lines


def _enlisting(operators: Iterable[str], **more: Any) -> dict[str, Any]:
    """A line that names the operators of a process."""
    return {"operators": sorted(operators), **more, "id": new_id()}  # the name last, where a change is looked for


def _meeting(operators: Iterable[str]) -> dict[str, Any]:
    """A line between two histories: it raises the accounts of all operators that the one before has."""
    return _enlisting(operators, meeting=True)


def _messages(lines: Iterable[dict[str, Any]]) -> bool:
    """Whether messages are among these lines."""
    return any("kind" in line for line in lines)


def _named(lines: Iterable[dict[str, Any]]) -> set[str]:
    """Operators that a journal knows."""
    return {name for line in lines for name in line.get("operators", ())}


def damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged, so nobody knows any more what operators have seen.",
        remedy="Use another copy of it. Without one, count the whole budget of that run as spent.",
    )


def _aside(path: Path, run: str) -> Path:
    """A name beside a journal that no other has."""
    names = (f"ledger-{run}{suffix}.jsonl" for suffix in ("", *(f"-{number}" for number in range(2, 10**6))))
    return next(other for other in map(path.with_name, names) if not other.exists())


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
    """The run that a journal belongs to; None if it is empty, or not there.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    if not path.exists():
        return None
    with path.open("rb") as file:
        first = file.readline()
    lines = parse_lines(path, first if first.endswith(b"\n") else b"")  # a crash may have cut it off
    return str(lines[0]["run"]) if lines else None


def _state(path: Path) -> tuple[int, int, bytes] | None:
    """Which file it is, how long, and its end; None if there is none. A copy put back may be as long as it was."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        file.seek(max(0, found.st_size - TAIL))
        return found.st_ino, found.st_size, file.read()


@contextmanager
def _writing(path: Path) -> Generator[None]:
    """Raises `CheckpointError` where the system refuses to write a journal."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be written: {error}.",
            remedy="Make it writable: it counts what operators have seen, before they see it.",
        ) from None
