"""Defines what an attacker on texts knows (the pretrained model, public text, the defence), and what it may compute.

A *static* attacker runs the pretrained bottom. An *adaptive* attacker has trained its own bottom with the client's
recipe, and simulates what the client does to hidden states before it sends them. Neither has the client's weights.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from blindtune.errors import ConfigError
from blindtune.models import CutModel, Part
from blindtune.models.cut.parts import decoder_of, pack, pad_rows, padding_mask, unpack

T = TypeVar("T")
Perturb = Callable[[Tensor], Tensor]
CHUNK = 32
"""Number of rows that run through a part at once."""


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden


@dataclass(frozen=True)
class Budget:
    """Limits what attacks may compute. The defaults take minutes for 64 texts of 32 tokens, SmolLM2-135M and one core.

    Attributes:
        public_rows: number of public texts that inverters of s_A learn from.
        deep_rows: number of public texts that inverters of s_B learn from. Each one runs through the trunk.
        epochs: epochs of SIP.
        negatives: number of other tokens in the sampled softmax of SIP.
        candidates: number of candidate tokens for each position.
        eia_steps: number of gradient steps on token logits.
        solver_steps: number of conjugate-gradient steps of TAG.
        lamp_rounds: number of changes that LAMP tries for each text.
    """

    public_rows: int = 1500
    deep_rows: int = 500
    epochs: int = 10
    negatives: int = 2048
    candidates: int = 32
    eia_steps: int = 60
    solver_steps: int = 30
    lamp_rounds: int = 6


@dataclass(frozen=True)
class PublicBatch:
    """Holds public text and its unperturbed hidden states: `ids (N,)`, `lengths (B,)`, `hidden (N, d)`."""

    ids: Tensor
    lengths: Tensor
    hidden: Tensor

    @property
    def positions(self) -> Tensor:
        """Returns the position of every token in its text, `(N,)`."""
        return torch.cat([torch.arange(length) for length in self.lengths.tolist()]).to(self.ids.device)


@dataclass(eq=False)
class Attacker:
    """Describes an honest-but-curious provider. Attackers are compared by identity.

    Attributes:
        model: the whole pretrained model.
        public: token rows of public texts, preferably about as long as the client's. Texts with one token are ignored.
        bottom: the bottom with which the attacker simulates the client; the pretrained one if None.
        send: maps tokens, of any shape, to the tokens that the client sends instead; None if it sends the texts.
        simulate: what the client does to s_A `(N, d)` before the provider reads it: codec, clipping, noise.
        expected: expected value of `simulate`. The default is right if nothing is random, or if the mean is s_A.
        seed: seed of all random draws.
        budget: limits of the computation.
    """

    model: CutModel
    public: Sequence[Sequence[int]]
    bottom: Part | None = None
    send: Callable[[Tensor], Tensor] | None = None
    simulate: Perturb = _unchanged
    expected: Perturb = _unchanged
    seed: int = 0
    budget: Budget = field(default_factory=Budget)
    _remembered: dict[str, Any] = field(default_factory=dict[str, Any], repr=False)

    @cached_property
    def simulated(self) -> Part:
        """Returns the bottom with which the attacker simulates the client."""
        return self.model.parts["bottom"] if self.bottom is None else self.bottom

    @property
    def device(self) -> torch.device:
        """Returns the device of the model."""
        return self.embeddings.device

    @cached_property
    def embeddings(self) -> Tensor:
        """Returns the embeddings of all tokens, `(V, e)`, float32."""
        with torch.no_grad():
            return self.model.parts["bottom"].embeddings().float()

    @cached_property
    def head(self) -> Tensor:
        """Returns the rows of the LM head, `(V, e)`, float32."""
        return cast(Any, self.model.causal).get_output_embeddings().weight.detach().float()

    def remember(self, name: str, make: Callable[[], T]) -> T:
        """Returns the result of `make`, which runs once. Its random draws depend on seed and name only."""
        if name not in self._remembered:
            self._remembered[name] = self.seeded(name, make)
        return self._remembered[name]

    def seeded(self, name: str, make: Callable[[], T]) -> T:
        """Returns the result of `make`, run with a separate random stream. Torch's global stream doesn't change."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed * 2**32 + zlib.crc32(name.encode()))
            return make()

    def rows(self, count: int) -> list[list[int]]:
        """Returns public texts, drawn at random and sorted by length. Raises `ConfigError` if there are none."""
        usable = [list(row) for row in self.public if len(row) > 1]
        if not usable:
            raise ConfigError(
                "The attacker has no public text.", remedy="Give public texts of at least two tokens each."
            )
        return sorted(random.Random(self.seed).sample(usable, min(count, len(usable))), key=len)

    def batches(self, rows: Sequence[Sequence[int]], *, replaced: float = 0.0) -> list[PublicBatch]:
        """Returns rows with their hidden states after the simulated bottom.

        Args:
            replaced: fraction of the tokens to replace by random ones, since public text lacks most of the vocabulary.
        """
        result: list[PublicBatch] = []
        for start in range(0, len(rows), CHUNK):
            ids, lengths = (x.to(self.device) for x in pad_rows(rows[start : start + CHUNK]))
            drawn = torch.randint(0, len(self.embeddings), ids.shape, device=ids.device)
            ids = torch.where(torch.rand(ids.shape, device=ids.device) < replaced, drawn, ids)
            result.append(PublicBatch(pack(ids, lengths), lengths, self.run_bottom(ids, lengths)))
        return result

    def public_batches(self) -> list[PublicBatch]:
        """Returns all public texts of the budget, without replaced tokens. Computes them once."""
        return self.remember("public", lambda: self.batches(self.rows(self.budget.public_rows)))

    def run_bottom(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Returns the unperturbed s_A `(N, d)`, float32, for tokens `(B, L)`."""
        with torch.no_grad():
            return pack(self.simulated(self.sent(ids), lengths), lengths).float()

    def sent(self, ids: Tensor) -> Tensor:
        """Returns the tokens that the client sends for these, of any shape."""
        return ids if self.send is None else self.send(ids)

    def run_trunk(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Returns s_B `(N, d)`, float32, for s_A `(N, d)`."""
        trunk = self.model.parts["trunk"]
        with torch.no_grad():
            parts = [
                pack(trunk(unpack(h, n).to(next(trunk.parameters()).dtype), n), n).float()
                for h, n in chunks(hidden, lengths)
            ]
        return torch.cat(parts)

    def logits(self, read: Tensor) -> Tensor:
        """Returns logits `(…, V)`, float32, for the input of the LM head `(…, e)`."""
        return cast(Any, self.model.causal).get_output_embeddings()(read).float()

    def bottom_from_embeddings(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        """Returns s_A `(B, L, d)`, float32, for any embeddings `(B, L, e)`; differentiable."""
        part = self.simulated
        mask = padding_mask(lengths, embedded.shape[1]).to(embedded.device)
        given = embedded.to(next(part.parameters()).dtype)
        output = decoder_of(part.causal)(inputs_embeds=given, attention_mask=mask, use_cache=False)
        return output.last_hidden_state.float()

    @cached_property
    def log_frequencies(self) -> Tensor:
        """Returns the smoothed log probability of each token in public text, `(V,)`."""
        ids = torch.tensor([token for row in self.public for token in row], dtype=torch.long, device=self.device)
        counts = torch.bincount(ids, minlength=len(self.embeddings)).float() + 0.05
        return (counts / counts.sum()).log()

    @cached_property
    def log_first_frequencies(self) -> Tensor:
        """Returns the smoothed log probability of each token to be the first one of a text, `(V,)`."""
        ids = torch.tensor([row[0] for row in self.public if len(row)], dtype=torch.long, device=self.device)
        counts = torch.bincount(ids, minlength=len(self.embeddings)).float() + self.log_frequencies.exp()
        return (counts / counts.sum()).log()


def chunks(packed: Tensor, lengths: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Splits packed `(N, …)` and lengths `(B,)` into chunks of `CHUNK` examples."""
    parts = lengths.split(CHUNK)
    return list(zip(packed.split([int(part.sum()) for part in parts]), parts, strict=True))
