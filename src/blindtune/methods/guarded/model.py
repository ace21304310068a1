"""A causal language model whose ends are here and whose middle is a function.

tokens ──▶ bottom ──▶ s_A ──▶ [codec, noise] middle ──▶ s_B ──▶ top ──▶ logits of the tokens that are learned
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blindtune.models.split import Part, answer_scores, pack, pad_rows, padding_mask, unpack


class Middle(Protocol):
    """s_B `(B, L, d)` for s_A `(B, L, d)` and lengths `(B,)`: `RemoteTrunk`, or a `Part` that is here."""

    def __call__(self, hidden: Tensor, lengths: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class CausalBatch:
    """Texts `ids (B, L)`, right-padded, their `lengths (B,)`, and `starts (B,)`: the first token that is learned."""

    ids: Tensor
    lengths: Tensor
    starts: Tensor

    @staticmethod
    def of(rows: Sequence[Sequence[int]], starts: Sequence[int]) -> CausalBatch:
        """From token rows of several lengths."""
        return CausalBatch(*pad_rows(rows), torch.tensor(starts))

    @property
    def learned(self) -> Tensor:
        """`(B, L)`: positions whose *next* token is learned."""
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (place >= self.starts.unsqueeze(1) - 1) & (place < self.lengths.unsqueeze(1) - 1)

    def to(self, device: torch.device) -> CausalBatch:
        """On another device."""
        return CausalBatch(self.ids.to(device), self.lengths.to(device), self.starts.to(device))

    def rows(self) -> list[list[int]]:
        """Token rows without padding."""
        return [ids[:length] for ids, length in zip(self.ids.tolist(), self.lengths.tolist(), strict=True)]


class SplitCausalLM(nn.Module):
    """Bottom and top, over a middle.

    Args:
        bottom, top: the ends; a tied head is the bottom's embeddings already (`blindtune.models.split.tie`).
        middle: trunk or emulator. Not a submodule: its weights are somebody else's, or frozen.
        disturb: applied to packed s_A `[N, d]` before it leaves, such as clipping and noise.
    """

    def __init__(self, bottom: Part, top: Part, middle: Middle, disturb: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.bottom, self.top = bottom, top
        self._middle: list[Any] = [middle]  # in a list, so that torch doesn't make an emulator ours to train
        self.disturb = disturb
        self.encode: Callable[[Tensor], Tensor] | None = None
        """Tokens to those that are sent in their places, any shape. What that changes in s_A is given back to s_B here,
        s_B(sent) + s_A(tokens) − s_A(sent): it would have passed the trunk's residual stream unchanged."""
        self.on_sent: Callable[[str, list[list[int]]], None] | None = None
        """Told the hash of each message that left, and the token rows in it: the truth that an audit scores against."""

    @property
    def device(self) -> torch.device:
        """Where the ends are, and where batches have to be."""
        return self.bottom.device

    @property
    def middle(self) -> Middle:
        return self._middle[0]

    @middle.setter
    def middle(self, middle: Middle) -> None:
        self._middle[0] = middle

    def smash(self, batch: CausalBatch) -> Tensor:
        """s_A `(B, L, d)`, as it leaves (but for the codec)."""
        smashed = self.bottom(self._sent(batch.ids), batch.lengths)
        if self.disturb is None:
            return smashed
        return unpack(self.disturb(pack(smashed, batch.lengths)), batch.lengths)

    def through(self, smashed: Tensor, batch: CausalBatch) -> Tensor:
        """s_B `(B, L, d)` of s_A."""
        result = self.middle(smashed, batch.lengths)
        sent = getattr(self.middle, "last_forward", None)
        if self.on_sent is not None and sent is not None:
            self.on_sent(sent, batch.rows())
        if self.encode is None:
            return result
        own = self.bottom(batch.ids, batch.lengths) - self.bottom(self._sent(batch.ids), batch.lengths)
        return result + own * padding_mask(batch.lengths, own.shape[1]).unsqueeze(-1)

    def _sent(self, ids: Tensor) -> Tensor:
        return ids if self.encode is None else self.encode(ids)

    def losses(self, carried: Tensor, batch: CausalBatch) -> Tensor:
        """−log p of every learned token, packed `(T,)`, for s_B `(B, L, d)`."""
        logits, targets = self._learned(carried, batch)
        return F.cross_entropy(logits.float(), targets, reduction="none")

    def _learned(self, carried: Tensor, batch: CausalBatch) -> tuple[Tensor, Tensor]:
        """Logits `(T, V)` and tokens `(T,)` of everything that is learned."""
        learned = batch.learned
        return self.top.logits(self.top(carried, batch.lengths)[learned]), batch.ids[:, 1:][learned[:, :-1]]

    def forward(self, batch: CausalBatch) -> Tensor:
        """Mean −log p over the learned tokens of the batch."""
        return self.losses(self.through(self.smash(batch), batch), batch).mean()

    def score(self, batch: CausalBatch) -> tuple[Tensor, Tensor]:
        """log p of each text's learned tokens together `(B,)`, and whether greedy decoding would write them `(B,)`.

        The batch may be on any device.
        """
        batch = batch.to(self.device)
        logits, targets = self._learned(self.through(self.smash(batch), batch), batch)
        return answer_scores(logits, targets, batch.learned.sum(1))

    def embedded(self, batch: CausalBatch) -> Tensor:
        """Frozen embeddings of all tokens, packed `[N, e]`."""
        with torch.no_grad():
            return self.bottom.embed(pack(batch.ids, batch.lengths))
