"""The boundary of the client: how hidden states are encoded and perturbed, sent to the trunk, and recorded.

tokens ──▶ encode ──▶ bottom ──▶ s_A ──▶ perturb ──▶ trunk ──▶ s_B
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from blindtune.models.cut.parts import Part
from blindtune.privacy.randomness import SecureGenerator
from blindtune.texts.activation_store import ActivationStore

Perturb = Callable[[Tensor, SecureGenerator], Tensor]
Encode = Callable[[Tensor], Tensor]
OnSent = Callable[[str, list[list[int]]], None]


class Trunk(Protocol):
    """Computes the blocks between bottom and top: a `blindtune.client.RemoteTrunk` or a `LocalTrunk`."""

    @property
    def traffic(self) -> Counter[str]:
        """Bytes of HTTP messages so far, by kind."""
        ...

    @property
    def last_forward(self) -> str | None:
        """SHA-256 of the last forward message; None before the first one, and if nothing is sent."""
        ...

    def __call__(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Computes s_B `(B, L, d)` from s_A `(B, L, d)` and lengths `(B,)`."""
        ...


class LocalTrunk:
    """Runs a trunk, or an emulator of it, in this process. Nothing is sent.

    It isn't a torch module, so that its weights aren't among those that a client trains.
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        self.traffic: Counter[str] = Counter()
        self.last_forward: str | None = None

    def __call__(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """See `Trunk`."""
        return self.part(hidden, lengths)


class Boundary:
    """Sends perturbed hidden states of encoded tokens to the trunk.

    Args:
        trunk: trunk that hidden states are sent to.
        perturb: `(s_A [N, d], generator) -> [N, d]`, such as clipping and noise. Default: s_A is unchanged.
        encode: function from tokens of any shape to the tokens that are sent instead. Default: tokens are unchanged.
        store: store of s_B of texts that were sent before, for designs whose bottom is frozen.
        key: 32 secret bytes that the noise of training messages is derived from. Default: from the operating system.

    Attributes:
        on_sent: callback invoked with the SHA-256 of each message and the token rows in it. They are the ground truth
            that an audit scores against.
    """

    def __init__(
        self,
        trunk: Trunk,
        *,
        perturb: Perturb | None = None,
        encode: Encode | None = None,
        store: ActivationStore | None = None,
        key: bytes | None = None,
    ) -> None:
        self.trunk, self.encode, self.store = trunk, encode, store
        self.on_sent: OnSent | None = None
        self._perturb = perturb
        self.secret = SecureGenerator(key)
        """Generator that the noise of training messages is derived from."""
        self._step: int | None = None
        self._messages = 0

    @contextmanager
    def training_step(self, number: int) -> Generator[None]:
        """Within this context, the noise of messages is derived from the key, the step's number and their order.

        So each message has different noise, and a repeated step sends the same messages again. Other messages, such as
        those of evaluations, get fresh noise.
        """
        self._step, self._messages = number, 0
        try:
            yield
        finally:
            self._step = None

    def perturb(self, packed: Tensor) -> Tensor:
        """Returns s_A `[N, d]` as it is sent, before the codec."""
        if self._perturb is None:
            return packed
        if self._step is None:
            return self._perturb(packed, SecureGenerator())
        name = f"{self._step} {self._messages}".encode()
        self._messages += 1
        return self._perturb(packed, self.secret.derive(b"noise", name))

    def cross(self, smashed: Tensor, lengths: Tensor, rows: Callable[[], Sequence[Sequence[int]]]) -> Tensor:
        """Sends s_A to the trunk, and returns s_B `(B, L, d)`.

        Args:
            smashed: s_A `(B, L, d)`, perturbed already (`perturb`).
            lengths: number of tokens in each text, `(B,)`.
            rows: function that returns the batch's token rows, for `on_sent`.
        """
        result = self.trunk(smashed, lengths)
        if self.on_sent is not None and self.trunk.last_forward is not None:
            self.on_sent(self.trunk.last_forward, [list(row) for row in rows()])
        return result
