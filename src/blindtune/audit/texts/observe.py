"""Reads the messages of a cut model's training that a provider recorded, and the ground truth for scoring.

    s_A  hidden states that it received    g_B  gradients with respect to s_B that it received
    s_B  hidden states that it sent        g_A  gradients with respect to s_A that it sent

A call is an `Exchange`. Its tensors are read only when they are needed, because a run may have gigabytes of them.

The client writes the ground truth as JSON lines, one for each forward call:
`{"forward": sha256 of its body, "ids": [[token ids of example 0], …], "part": "train"}`. Attacks don't receive it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
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
Visible = Literal["s_A", "s_B", "gradients"]
"""What an attack may observe. Every attack observes lengths."""


@dataclass(frozen=True)
class Observed:
    """Holds hidden states and gradients of examples, packed: N tokens, one example after the other.

    Attributes:
        lengths: `(B,)`, int64; number of tokens of each example, N in all.
        s_a, s_b: `(N, d)`, float32.
        g_b, g_a: `(N, d)`, float32; None if no backward call followed.
    """

    lengths: Tensor
    s_a: Tensor
    s_b: Tensor
    g_b: Tensor | None = None
    g_a: Tensor | None = None
    _remembered: dict[tuple[Hashable, str], Any] = field(
        default_factory=dict[tuple[Hashable, str], Any], repr=False, compare=False
    )

    def remember(self, name: str, attacker: Hashable, make: Callable[[], T]) -> T:
        """Returns the result of `make`, which runs once for each attacker and name: several attacks share steps."""
        key = (attacker, name)
        if key not in self._remembered:
            self._remembered[key] = make()
        return self._remembered[key]

    @property
    def received_gradients(self) -> Tensor:
        """Returns g_B. Raises `ValueError` if there is none. See `Attack.applies`."""
        if self.g_b is None:
            raise ValueError("No backward call followed.")
        return self.g_b

    @property
    def positions(self) -> Tensor:
        """Returns the position of every token in its example, `(N,)`."""
        return torch.cat([torch.arange(length) for length in self.lengths.tolist()]).to(self.s_a.device)

    def only(self, visible: Sequence[Visible]) -> Observed:
        """Returns a copy without invisible tensors: such hidden states have no columns, and such gradients are None."""
        return Observed(
            self.lengths,
            self.s_a if "s_A" in visible else self.s_a[:, :0],
            self.s_b if "s_B" in visible else self.s_b[:, :0],
            self.g_b if "gradients" in visible else None,
            self.g_a if "gradients" in visible else None,
            self._remembered,
        )

    def first(self, count: int) -> Observed:
        """Returns the first `count` examples, or all if there are fewer."""
        tokens = int(self.lengths[:count].sum())
        g_b = None if self.g_b is None else self.g_b[:tokens]
        g_a = None if self.g_a is None else self.g_a[:tokens]
        return Observed(self.lengths[:count], self.s_a[:tokens], self.s_b[:tokens], g_b, g_a)

    def to(self, device: torch.device) -> Observed:
        """Returns a copy on another device; the lengths stay on theirs."""
        return replace(
            self,
            s_a=self.s_a.to(device),
            s_b=self.s_b.to(device),
            g_b=None if self.g_b is None else self.g_b.to(device),
            g_a=None if self.g_a is None else self.g_a.to(device),
        )

    @staticmethod
    def join(parts: Sequence[Observed]) -> Observed:
        """Joins the examples of the parts. The result has gradients if every part has them."""
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
    """Describes one forward call, and the backward call that named it, if there was one.

    Attributes:
        step: number of the forward event.
        forward: SHA-256 of its body.
        read: reads the tensors.
    """

    step: int
    forward: str
    read: Callable[[], Observed]


def read_exchanges(transcript: Transcript, model: str, *, dim: int) -> list[Exchange]:
    """Returns all calls of the trunk of one model, in order.

    Args:
        dim: the hidden size of the model. Messages in int4 are padded, so their width is no substitute for it.
    Raises:
        TranscriptError: there is no call.
    """
    forwards = [event for event in transcript.events if event.kind == "trunk-forward" and event.model == model]
    if not forwards:
        known = sorted({event.model for event in transcript.events if event.kind == "trunk-forward"})
        raise TranscriptError(
            f"{transcript.folder} has no call of the trunk of {model!r}.",
            remedy=f"Trunks were called of: {', '.join(known)}." if known else "Record a cut model's training.",
        )
    backwards: dict[int, Event] = {}
    latest: dict[tuple[str, str | None], int] = {}  # the same batch may be sent again, in the same bytes
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
        raise TranscriptError("A trunk's message doesn't say how it was encoded.", remedy="Record the run again.")
    return codec


class TrueCall(BaseModel):
    """Holds one line of the ground truth: the texts of one forward call."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    forward: str
    ids: list[list[int]]
    part: str = "train"


class GroundTruth:
    """Maps the SHA-256 of the body of every forward call to its tokens."""

    def __init__(self, calls: Sequence[TrueCall]) -> None:
        self._calls = {call.forward: call for call in calls}

    @staticmethod
    def read(path: Path) -> GroundTruth:
        """Reads a file. Raises `TranscriptError` if there is no such file, or for a line that isn't a `TrueCall`."""
        if not path.is_file():
            raise TranscriptError(f"There is no file {path}.", remedy="Name the file that the client wrote.")
        calls: list[TrueCall] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                calls.append(TrueCall.model_validate_json(line))
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise TranscriptError(f"Line {number} of {path} isn't a call's truth: {reason}.") from None
        return GroundTruth(calls)

    def of(self, exchange: Exchange) -> TrueCall:
        """Returns the texts of one call. Raises `TranscriptError` for a call that isn't in the ground truth."""
        if exchange.forward not in self._calls:
            raise TranscriptError(
                f"The truth ({len(self._calls)} calls) lacks the forward call {exchange.forward[:12]}… of event "
                f"{exchange.step}.",
                remedy="Use the file that the client wrote during this very run.",
            )
        return self._calls[exchange.forward]
