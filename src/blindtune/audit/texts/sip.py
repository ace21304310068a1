"""SIP: trains an inverter on public text. A GRU layer of width 256 maps hidden states to the expected embedding.

    logits_t = E (W GRU(s)_t + b) / std(E)

The output layer is the frozen embedding matrix E of the model. A separate layer would have 12 million weights, and
could output only tokens of the public text. The loss is a sampled softmax over the tokens of the batch and some others,
whose logits are raised by log(V / sampled) to represent all tokens that weren't drawn.

s_A depends little on the context, so half of the public tokens are replaced by random ones, to cover the vocabulary.
s_B depends on the context, so its inverter is trained on unchanged text.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blindtune.audit.texts.attacker import Attacker, PublicBatch
from blindtune.audit.texts.observe import Observed
from blindtune.audit.texts.registry import attack
from blindtune.audit.texts.shortlist import Shortlist
from blindtune.models.cut.parts import pack, unpack

WIDTH = 256
RATE = 3e-3
REPLACED = 0.5
LIMIT = 5.0
"""Standardised hidden states are clipped to ± this value, because a few values of a text's first token are huge."""


class Inverter(nn.Module):
    """Maps hidden states `(B, L, d)` to expected embeddings `(B, L, e)`, in units of the embeddings' deviation."""

    def __init__(self, mean: Tensor, deviation: Tensor, embedding: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.gru = nn.GRU(len(mean), WIDTH, batch_first=True)
        self.output = nn.Linear(WIDTH, embedding)

    def forward(self, hidden: Tensor) -> Tensor:
        standard = (hidden - self.get_buffer("mean")) / self.get_buffer("deviation")
        return self.output(self.gru(standard.clamp(-LIMIT, LIMIT))[0])


Observe = Callable[[PublicBatch], Tensor]


def learn(batches: list[PublicBatch], observe: Observe, attacker: Attacker) -> Inverter:
    """Trains an inverter.

    Args:
        observe: computes the hidden states `(N, d)` of a batch. It is called in every epoch, for fresh noise.
    """
    budget, vocabulary = attacker.budget, attacker.embeddings / attacker.embeddings.std()
    sample = torch.cat([observe(batch) for batch in batches])
    inverter = Inverter(sample.mean(0), sample.std(0) + 1e-6, vocabulary.shape[1]).to(sample.device)
    optimizer = torch.optim.AdamW(inverter.parameters(), lr=RATE)
    steps = budget.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / max(steps, 1)))
    count = min(budget.negatives, len(vocabulary))
    for _ in range(budget.epochs):
        for index in torch.randperm(len(batches)).tolist():
            batch = batches[index]
            own = batch.ids.unique()
            others = torch.randperm(len(vocabulary), device=own.device)[:count]
            others = others[~torch.isin(others, own)]
            raised = torch.full((len(others),), math.log(len(vocabulary) / count), device=own.device)
            expected = pack(inverter(unpack(observe(batch), batch.lengths)), batch.lengths)  # (N, e)
            logits = expected @ vocabulary[torch.cat([own, others])].T
            logits = logits + torch.cat([torch.zeros(len(own), device=own.device), raised])
            loss = F.cross_entropy(logits, torch.searchsorted(own, batch.ids))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(inverter.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return inverter.requires_grad_(False)


def _rate(done: float) -> float:
    """Returns the factor of the learning rate: a short linear warm-up, then half a cosine down to zero."""
    return min(10 * done + 0.1, 0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)))


def inverter_of_s_a(attacker: Attacker) -> Inverter:
    """Returns the inverter of s_A, which is trained once."""

    def make() -> Inverter:
        batches = attacker.batches(attacker.rows(attacker.budget.public_rows), replaced=REPLACED)
        return learn(batches, lambda batch: attacker.simulate(batch.hidden), attacker)

    return attacker.remember("SIP", make)


def inverter_of_s_b(attacker: Attacker) -> Inverter:
    """Returns the inverter of s_B, which is trained once.

    The trunk runs once for each public text, so all epochs see the same draw of noise.
    """

    def make() -> Inverter:
        plain = attacker.batches(attacker.rows(attacker.budget.deep_rows))
        batches = [
            PublicBatch(b.ids, b.lengths, attacker.run_trunk(attacker.simulate(b.hidden), b.lengths)) for b in plain
        ]
        return learn(batches, lambda batch: batch.hidden, attacker)

    return attacker.remember("SIP on s_B", make)


def invert(inverter: Inverter, hidden: Tensor, observed: Observed, attacker: Attacker) -> Shortlist:
    """Returns candidates for hidden states `(N, d)`."""
    lengths = observed.lengths.to(hidden.device)
    vocabulary = attacker.embeddings / attacker.embeddings.std()
    expected = pack(inverter(unpack(hidden, lengths)), lengths)
    return Shortlist.of(lambda positions: expected[positions] @ vocabulary.T, len(hidden), attacker.budget.candidates)


def sip_shortlist(observed: Observed, attacker: Attacker) -> Shortlist:
    """Returns candidates from s_A."""
    return observed.remember(
        "SIP", attacker, lambda: invert(inverter_of_s_a(attacker), observed.s_a, observed, attacker)
    )


@attack("SIP", observes=("s_A",), needs=("bottom", "public text"))
def sip(observed: Observed, attacker: Attacker) -> Tensor:
    return sip_shortlist(observed, attacker).best


@attack("SIP on s_B", observes=("s_B",), needs=("bottom", "trunk", "public text"))
def sip_on_s_b(observed: Observed, attacker: Attacker) -> Tensor:
    return invert(inverter_of_s_b(attacker), observed.s_b, observed, attacker).best
