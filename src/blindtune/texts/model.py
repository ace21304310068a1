"""A causal language model whose ends run in this process, with a boundary to the trunk between them.

tokens ──▶ bottom ──▶ s_A ──▶ boundary ──▶ s_B ──▶ top ──▶ logits of the learned tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blindtune.models.cut.parts import Part, answer_scores, pack, pad_rows, padding_mask, unpack
from blindtune.texts.boundary import Boundary


@dataclass(frozen=True)
class CausalBatch:
    """A batch of texts, of which the tokens from a start on are learned or scored.

    Attributes:
        ids: token ids `(B, L)`, right-padded.
        lengths: number of tokens in each text, `(B,)`.
        starts: index of the first learned token in each text, `(B,)`.
    """

    ids: Tensor
    lengths: Tensor
    starts: Tensor

    @staticmethod
    def of(rows: Sequence[Sequence[int]], starts: Sequence[int]) -> CausalBatch:
        """Returns a batch of token rows, padded to the longest one."""
        return CausalBatch(*pad_rows(rows), torch.tensor(starts))

    @property
    def learned(self) -> Tensor:
        """Mask `(B, L)` of the positions whose *next* token is learned."""
        position = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (position >= self.starts.unsqueeze(1) - 1) & (position < self.lengths.unsqueeze(1) - 1)

    def to(self, device: torch.device) -> CausalBatch:
        """Returns the batch on another device."""
        return CausalBatch(self.ids.to(device), self.lengths.to(device), self.starts.to(device))

    def rows(self) -> list[list[int]]:
        """Returns the token rows without padding."""
        return [ids[:length] for ids, length in zip(self.ids.tolist(), self.lengths.tolist(), strict=True)]


class CutCausalLM(nn.Module):
    """A causal language model with local ends, and a remote trunk or a local emulator of it.

    Args:
        bottom, top: the ends. A tied head has to share the bottom's embeddings already (`blindtune.models.cut.tie`).
        boundary: boundary through which hidden states are sent to the trunk.
    """

    def __init__(self, bottom: Part, top: Part, boundary: Boundary) -> None:
        super().__init__()
        self.bottom, self.top, self.boundary = bottom, top, boundary

    @property
    def device(self) -> torch.device:
        """Torch device of the ends. Batches have to be there too, except those of `score`."""
        return self.bottom.device

    def smash(self, batch: CausalBatch) -> Tensor:
        """Computes s_A `(B, L, d)` as it is sent, before the codec."""
        smashed = self.bottom(self._sent(batch.ids), batch.lengths)
        return unpack(self.boundary.perturb(pack(smashed, batch.lengths)), batch.lengths)

    def through(self, smashed: Tensor, batch: CausalBatch) -> Tensor:
        """Computes s_B `(B, L, d)` from s_A.

        If other tokens are sent instead of the text's, the resulting difference in s_A is added to s_B,
        s_B(sent) + s_A(tokens) − s_A(sent), since the trunk's residual stream would pass it on unchanged.
        """
        result = self.boundary.cross(smashed, batch.lengths, batch.rows)
        if self.boundary.encode is None:
            return result
        own = self.bottom(batch.ids, batch.lengths) - self.bottom(self._sent(batch.ids), batch.lengths)
        return result + own * padding_mask(batch.lengths, own.shape[1]).unsqueeze(-1)

    def _sent(self, ids: Tensor) -> Tensor:
        return ids if self.boundary.encode is None else self.boundary.encode(ids)

    def losses(self, trunk_output: Tensor, batch: CausalBatch) -> Tensor:
        """Computes −log p of each learned token, packed `(T,)`, in nats, from s_B `(B, L, d)`."""
        logits, targets = self._learned(trunk_output, batch)
        return F.cross_entropy(logits.float(), targets, reduction="none")

    def _learned(self, trunk_output: Tensor, batch: CausalBatch) -> tuple[Tensor, Tensor]:
        """Returns the logits `(T, V)` and the ids `(T,)` of the learned tokens."""
        learned = batch.learned
        return self.top.logits(self.top(trunk_output, batch.lengths)[learned]), batch.ids[:, 1:][learned[:, :-1]]

    def forward(self, batch: CausalBatch) -> Tensor:
        """Computes the mean −log p over the learned tokens of the batch, in nats."""
        return self.losses(self.through(self.smash(batch), batch), batch).mean()

    def score(self, batch: CausalBatch) -> tuple[Tensor, Tensor]:
        """Returns the sum of log p over each text's learned tokens `(B,)`, in nats, and whether greedy decoding would
        generate them `(B,)`.

        The batch may be on any device.
        """
        batch = batch.to(self.device)
        logits, targets = self._learned(self.through(self.smash(batch), batch), batch)
        return answer_scores(logits, targets, batch.learned.sum(1))

    def embedded(self, batch: CausalBatch) -> Tensor:
        """Returns the frozen embeddings of all tokens, packed `[N, e]`."""
        with torch.no_grad():
            return self.bottom.embed(pack(batch.ids, batch.lengths))
