"""What a provider saw of a split model's training, call by call, and the file of true texts that only scoring reads.

    s_A  hidden states that it received    g_B  gradients with respect to s_B that it received
    s_B  hidden states that it sent        g_A  gradients with respect to s_A that it sent

A call is an `Exchange`; its tensors are read when an attack asks for them, since a run has gigabytes of them.

The truth is a file of the client's, JSON lines, one for each forward call:
`{"forward": sha256 of its body, "ids": [[token ids of example 0], …], "part": "train"}`. No attack is given it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from blindtune.errors import TranscriptError
from blindtune.wire import Codec, Event, Transcript, dequantize

T = TypeVar("T")
Seen = Literal["s_A", "s_B", "gradients"]
"""What an attack may look at. Everybody sees lengths."""


@dataclass(frozen=True)
class Observed:
    """Hidden states and gradients of some examples, packed: N tokens, one example after the other.

    Attributes:
        lengths: `(B,)`, int64; tokens of each example, N in all.
        s_a, s_b: `(N, d)`, float32.
        g_b, g_a: `(N, d)`, float32; None if no backward call followed.
    """

    lengths: Tensor
    s_a: Tensor
    s_b: Tensor
    g_b: Tensor | None = None
    g_a: Tensor | None = None
    _found: dict[tuple[int, str], Any] = field(default_factory=dict[tuple[int, str], Any], repr=False, compare=False)

    def remember(self, name: str, attacker: object, make: Callable[[], T]) -> T:
        """What `make` gives, computed once for each attacker: several attacks begin with the same step."""
        key = (id(attacker), name)
        if key not in self._found:
            self._found[key] = (attacker, make())  # the attacker is kept, so that no other one gets its id
        return self._found[key][1]

    @property
    def received_gradients(self) -> Tensor:
        """g_B. Raises `ValueError` if there is none: see `Attack.applies`."""
        if self.g_b is None:
            raise ValueError("No backward call followed.")
        return self.g_b

    @property
    def positions(self) -> Tensor:
        """Place of every token in its example, `(N,)`."""
        return torch.cat([torch.arange(length) for length in self.lengths.tolist()]).to(self.s_a.device)

    def only(self, seen: Sequence[Seen]) -> Observed:
        """Without what isn't listed: no columns (hidden states) or None (gradients)."""
        return Observed(
            self.lengths,
            self.s_a if "s_A" in seen else self.s_a[:, :0],
            self.s_b if "s_B" in seen else self.s_b[:, :0],
            *((self.g_b, self.g_a) if "gradients" in seen else (None, None)),
            self._found,
        )

    def first(self, count: int) -> Observed:
        """The first examples, at most `count`."""
        tokens = int(self.lengths[:count].sum())
        g_b, g_a = (None if g is None else g[:tokens] for g in (self.g_b, self.g_a))
        return Observed(self.lengths[:count], self.s_a[:tokens], self.s_b[:tokens], g_b, g_a)

    def to(self, device: torch.device) -> Observed:
        """On another device, all but the lengths."""
        moved = {name: getattr(self, name) for name in ("s_a", "s_b", "g_b", "g_a")}
        return replace(self, **{name: None if t is None else t.to(device) for name, t in moved.items()})

    @staticmethod
    def join(parts: Sequence[Observed]) -> Observed:
        """All examples; without gradients unless every part has them."""
        g_b = [part.g_b for part in parts if part.g_b is not None]
        g_a = [part.g_a for part in parts if part.g_a is not None]
        return Observed(
            torch.cat([part.lengths for part in parts]),
            torch.cat([part.s_a for part in parts]),
            torch.cat([part.s_b for part in parts]),
            torch.cat(g_b) if len(g_b) == len(parts) else None,
            torch.cat(g_a) if len(g_a) == len(parts) else None,
        )


@dataclass(frozen=True)
class Exchange:
    """One forward call, and the backward call that named it if there was one.

    Attributes:
        step: the forward event's number.
        forward: SHA-256 of its body.
        read: gives the tensors.
    """

    step: int
    forward: str
    read: Callable[[], Observed]


def read_exchanges(transcript: Transcript, model: str, *, dim: int) -> list[Exchange]:
    """All calls of one model's trunk, in order.

    Args:
        dim: the model's hidden size; int4 travels with more values than that.
    Raises:
        TranscriptError: there is none.
    """
    forwards = [event for event in transcript.events if event.kind == "trunk-forward" and event.model == model]
    if not forwards:
        known = sorted({event.model for event in transcript.events if event.kind == "trunk-forward"})
        raise TranscriptError(
            f"{transcript.folder} has no call of the trunk of {model!r}.",
            remedy=f"Trunks were called of: {', '.join(known)}." if known else "Record a split model's training.",
        )
    backwards: dict[int, Event] = {}
    latest: dict[tuple[str, str | None], int] = {}  # the same batch may come again, in the same bytes
    for event in transcript.events:
        if event.model == model and event.kind == "trunk-forward":
            latest[event.tenant, event.forward] = event.event
        elif event.model == model and event.kind == "trunk-backward" and (event.tenant, event.forward) in latest:
            backwards[latest[event.tenant, event.forward]] = event
    return [
        Exchange(event.event, event.forward or "", partial(_read, transcript, event, backwards.get(event.event), dim))
        for event in forwards
    ]


def _read(transcript: Transcript, forward: Event, backward: Event | None, dim: int) -> Observed:
    up, down = _codec(forward.up), _codec(forward.down)
    tensors = transcript.tensors(forward)
    s_a, s_b = dequantize("hidden", tensors, up, dim), dequantize("answer", tensors, down, dim)
    lengths = tensors["lengths"].long()
    if backward is None:
        return Observed(lengths, s_a, s_b)
    tensors = transcript.tensors(backward)
    g_b = dequantize("cotangents", tensors, _codec(backward.up), dim)
    return Observed(lengths, s_a, s_b, g_b, dequantize("answer", tensors, _codec(backward.down), dim))


def _codec(codec: Codec | None) -> Codec:
    if codec is None:
        raise TranscriptError("A trunk's message doesn't say how it was encoded.", remedy="Record it again.")
    return codec


class TrueCall(BaseModel):
    """One line of the truth: the texts of one forward call."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    forward: str
    ids: list[list[int]]
    part: str = "train"


class Truth:
    """Tokens of every forward call, by the SHA-256 of its body."""

    def __init__(self, calls: Sequence[TrueCall]) -> None:
        self._calls = {call.forward: call for call in calls}

    @staticmethod
    def read(path: Path) -> Truth:
        """Raises `TranscriptError`: no such file, or a line that isn't one of the truth."""
        if not path.is_file():
            raise TranscriptError(f"There is no file {path}.", remedy="Name the truth that the client wrote.")
        calls: list[TrueCall] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                calls.append(TrueCall.model_validate_json(line))
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise TranscriptError(f"Line {number} of {path} isn't a call's truth: {reason}.") from None
        return Truth(calls)

    def of(self, exchange: Exchange) -> TrueCall:
        """Raises `TranscriptError` for a call that isn't in the truth."""
        if exchange.forward not in self._calls:
            raise TranscriptError(
                f"The truth ({len(self._calls)} calls) lacks the forward call {exchange.forward[:12]}… of event "
                f"{exchange.step}.",
                remedy="Use the file that the client wrote during this very run.",
            )
        return self._calls[exchange.forward]
