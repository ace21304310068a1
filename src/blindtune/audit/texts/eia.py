"""EIA: optimises token logits by gradient steps, so that the output of the bottom approaches s_A.

Logits over candidates give a mixture of their embeddings. A falling temperature reduces each mixture to one token.

    min over logits z   Σ_t |f(softmax(z / τ) E)_t − s_A,t|² / |s_A,t|²

Values are in units of their standard deviation over the vocabulary. The attack takes its candidates from the table
(`blindtune.audit.texts.table`), with equal logits at the start. BiSR(f) starts from other candidates and logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blindtune.audit.texts.attacker import Attacker, chunks
from blindtune.audit.texts.observe import Observed
from blindtune.audit.texts.registry import attack
from blindtune.audit.texts.shortlist import Shortlist
from blindtune.audit.texts.table import nearest_shortlist, tables
from blindtune.models.cut.parts import pack, unpack

RATE = 0.3
WARM, COLD = 1.0, 0.1
"""Temperatures at the first and at the last step."""


@attack("EIA", observes=("s_A",), needs=("bottom", "public text"))
def eia(observed: Observed, attacker: Attacker) -> Tensor:
    nearest = nearest_shortlist(observed, attacker)
    return match_forward(Shortlist(nearest.ids, torch.zeros_like(nearest.scores)), observed, attacker).best


def match_forward(start: Shortlist, observed: Observed, attacker: Attacker) -> Shortlist:
    """Returns the same candidates with scores that are optimised so that the output of the bottom is near s_A."""
    lengths = observed.lengths.to(attacker.device)
    logits: list[Tensor] = []
    for (ids, part), (scores, _), (states, _) in zip(
        chunks(start.ids, lengths), chunks(start.scores, lengths), chunks(observed.s_a, lengths), strict=True
    ):
        logits.append(_match(ids, scores, states, part, attacker))
    scores = torch.cat(logits).log_softmax(-1)
    order = scores.argsort(dim=1, descending=True)
    return Shortlist(start.ids.gather(1, order), scores.gather(1, order))


def _match(ids: Tensor, scores: Tensor, states: Tensor, lengths: Tensor, attacker: Attacker) -> Tensor:
    """Returns optimised logits `(n, K)` for candidates `ids (n, K)`."""
    deviation = tables(attacker)[1].states.std(0) + 1e-6
    target = states / deviation
    sizes = target.square().sum(1).clamp_min(1e-6)
    embedded = attacker.embeddings[ids]  # (n, K, e)
    logits = scores.clamp_min(-10.0).clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=RATE)
    steps = attacker.budget.eia_steps
    for step in range(steps):
        temperature = WARM * (COLD / WARM) ** (step / max(steps - 1, 1))
        mixed = torch.einsum("nk,nke->ne", (logits / temperature).softmax(-1), embedded)
        hidden = pack(attacker.bottom_from_embeddings(unpack(mixed, lengths), lengths), lengths)
        loss = ((attacker.expected(hidden) / deviation - target).square().sum(1) / sizes).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        logits.grad = gradient
        optimizer.step()
    return logits.detach()
