"""What the provider knows and may spend when it tries to read texts: the pretrained model, public text, the defence.

A *static* attacker runs the clean pretrained bottom. An *adaptive* one has trained a bottom of its own with the
client's recipe, and passes what the client does to hidden states before they leave. Neither has the client's weights.
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
from blindtune.models import Part, SplitModel
from blindtune.models.split import decoder_of, pack, pad_rows, padding_mask, unpack

T = TypeVar("T")
Disturb = Callable[[Tensor], Tensor]
CHUNK = 32
"""Rows that are run through a part at once."""


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden


@dataclass(frozen=True)
class Budget:
    """What attacks may spend. The defaults are minutes for 64 texts of 32 tokens, SmolLM2-135M and one core.

    Attributes:
        public_rows: public texts that inverters of s_A learn from; `deep_rows`: those of s_B, which cost a trunk.
        epochs, negatives: of SIP; tokens against which each right one is held (sampled softmax).
        candidates: tokens for each position that are tried in earnest.
        eia_steps: gradient steps on token logits.
        solver_steps: conjugate gradients of TAG.
        lamp_rounds: moves tried for each text.
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
    """Public text and its hidden states before any disturbance: `ids (N,)`, `lengths (B,)`, `hidden (N, d)`."""

    ids: Tensor
    lengths: Tensor
    hidden: Tensor

    @property
    def positions(self) -> Tensor:
        return torch.cat([torch.arange(length) for length in self.lengths.tolist()]).to(self.ids.device)


@dataclass
class Attacker:
    """An honest-but-curious provider.

    Attributes:
        model: the whole pretrained model.
        public: token rows of public texts, best about as long as the victim's; those with one token are ignored.
        bottom: the bottom that it simulates the client with; the pretrained one if None.
        send: tokens to those that the client puts in their places, any shape; None if it sends texts as they are.
        simulate: what the client does to s_A `(N, d)` before the provider reads it: codec, clipping, noise.
        expected: the same without what is random in it. Leave it alone if nothing is, or if its mean is s_A.
        seed: of everything that is drawn.
    """

    model: SplitModel
    public: Sequence[Sequence[int]]
    bottom: Part | None = None
    send: Callable[[Tensor], Tensor] | None = None
    simulate: Disturb = _unchanged
    expected: Disturb = _unchanged
    seed: int = 0
    budget: Budget = field(default_factory=Budget)
    _known: dict[str, Any] = field(default_factory=dict[str, Any], repr=False)

    @cached_property
    def simulated(self) -> Part:
        return self.model.parts["bottom"] if self.bottom is None else self.bottom

    @property
    def device(self) -> torch.device:
        return self.embeddings.device

    @cached_property
    def embeddings(self) -> Tensor:
        """Of all tokens, `(V, e)`, float32."""
        with torch.no_grad():
            return self.model.parts["bottom"].embeddings().float()

    @cached_property
    def head(self) -> Tensor:
        """Rows of the LM head, `(V, e)`, float32."""
        return cast(Any, self.model.causal).get_output_embeddings().weight.detach().float()

    def remember(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives, computed once; its randomness depends on the seed and the name alone."""
        if name not in self._known:
            self._known[name] = self.seeded(name, make)
        return self._known[name]

    def seeded(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives from a random stream of its own. Torch's global stream stays as it was."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed * 2**32 + zlib.crc32(name.encode()))
            return make()

    def rows(self, count: int) -> list[list[int]]:
        """Public texts, drawn at random, then sorted by length. Raises `ConfigError` if there are none."""
        usable = [list(row) for row in self.public if len(row) > 1]
        if not usable:
            raise ConfigError("The attacker has no public text.", remedy="Give it some, of at least two tokens each.")
        return sorted(random.Random(self.seed).sample(usable, min(count, len(usable))), key=len)

    def batches(self, rows: Sequence[Sequence[int]], *, replaced: float = 0.0) -> list[PublicBatch]:
        """Rows under the simulated bottom.

        Args:
            replaced: part of the tokens that random ones take the place of: public text lacks most of the vocabulary.
        """
        result: list[PublicBatch] = []
        for start in range(0, len(rows), CHUNK):
            ids, lengths = (x.to(self.device) for x in pad_rows(rows[start : start + CHUNK]))
            drawn = torch.randint(0, len(self.embeddings), ids.shape, device=ids.device)
            ids = torch.where(torch.rand(ids.shape, device=ids.device) < replaced, drawn, ids)
            result.append(PublicBatch(pack(ids, lengths), lengths, self.run_bottom(ids, lengths)))
        return result

    def public_batches(self) -> list[PublicBatch]:
        """All public texts of the budget as they are. Made once."""
        return self.remember("public", lambda: self.batches(self.rows(self.budget.public_rows)))

    def run_bottom(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """s_A as computed `(N, d)`, float32, for tokens `(B, L)`."""
        with torch.no_grad():
            return pack(self.simulated(self.sent(ids), lengths), lengths).float()

    def sent(self, ids: Tensor) -> Tensor:
        """Tokens as the client sends them, of any shape."""
        return ids if self.send is None else self.send(ids)

    def run_trunk(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """s_B `(N, d)`, float32, for s_A `(N, d)`."""
        trunk = self.model.parts["trunk"]
        with torch.no_grad():
            parts = [
                pack(trunk(unpack(h, n).to(next(trunk.parameters()).dtype), n), n).float()
                for h, n in chunks(hidden, lengths)
            ]
        return torch.cat(parts)

    def logits(self, read: Tensor) -> Tensor:
        """`(…, V)`, float32, for what the LM head reads `(…, e)`."""
        return cast(Any, self.model.causal).get_output_embeddings()(read).float()

    def bottom_from_embeddings(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        """s_A `(B, L, d)`, float32, for embeddings `(B, L, e)` that needn't be a token's; differentiable."""
        part = self.simulated
        mask = padding_mask(lengths, embedded.shape[1]).to(embedded.device)
        given = embedded.to(next(part.parameters()).dtype)
        output = decoder_of(part.causal)(inputs_embeds=given, attention_mask=mask, use_cache=False)
        return output.last_hidden_state.float()

    @cached_property
    def log_frequencies(self) -> Tensor:
        """Log probability of each token in public text, smoothed, `(V,)`."""
        ids = torch.tensor([token for row in self.public for token in row], dtype=torch.long, device=self.device)
        counts = torch.bincount(ids, minlength=len(self.embeddings)).float() + 0.05
        return (counts / counts.sum()).log()

    @cached_property
    def log_first_frequencies(self) -> Tensor:
        """The same for the first token of a text, `(V,)`."""
        ids = torch.tensor([row[0] for row in self.public if len(row)], dtype=torch.long, device=self.device)
        counts = torch.bincount(ids, minlength=len(self.embeddings)).float() + self.log_frequencies.exp()
        return (counts / counts.sum()).log()


def chunks(packed: Tensor, lengths: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Packed `(N, …)` and lengths `(B,)` of `CHUNK` examples at a time."""
    few = lengths.split(CHUNK)
    return list(zip(packed.split([int(part.sum()) for part in few]), few, strict=True))
