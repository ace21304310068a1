"""EIA: tokens as free variables. Logits over candidates give a mixture of embeddings; gradient steps bring the bottom's
output to s_A, while a falling temperature brings each mixture to one token.

    min over logits z   Σ_t |f(softmax(z / τ) E)_t − s_A,t|² / |s_A,t|²

in units of each value's deviation over the vocabulary. Candidates are the table's, and all start alike; BiSR(f) brings
its own, with a start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blindtune.audit.inputs.attacker import Attacker, chunks
from blindtune.audit.inputs.observe import Observed
from blindtune.audit.inputs.registry import attack
from blindtune.audit.inputs.shortlist import Shortlist
from blindtune.audit.inputs.table import nearest_shortlist, tables
from blindtune.models.split import pack, unpack

RATE = 0.3
WARM, COLD = 1.0, 0.1
"""Temperature at the first and at the last step."""


@attack("EIA", observes=("s_A",), needs=("bottom", "public text"))
def eia(observed: Observed, attacker: Attacker) -> Tensor:
    nearest = nearest_shortlist(observed, attacker)
    return match_forward(Shortlist(nearest.ids, torch.zeros_like(nearest.scores)), observed, attacker).best


def match_forward(start: Shortlist, observed: Observed, attacker: Attacker) -> Shortlist:
    """The same candidates, with the scores under which the attacker's bottom comes nearest to s_A."""
    lengths = observed.lengths.to(attacker.device)
    width = start.ids.shape[1]
    together = torch.cat([start.ids.float(), start.scores, observed.s_a], dim=1)  # so that all are chunked alike
    parts = [
        _match(part[:, :width].long(), part[:, width : 2 * width], part[:, 2 * width :], some, attacker)
        for part, some in chunks(together, lengths)
    ]
    scores = torch.cat(parts).log_softmax(-1)
    order = scores.argsort(dim=1, descending=True)
    return Shortlist(start.ids.gather(1, order), scores.gather(1, order))


def _match(ids: Tensor, scores: Tensor, states: Tensor, lengths: Tensor, attacker: Attacker) -> Tensor:
    """Logits `(n, K)` for candidates `ids (n, K)`."""
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
        given = attacker.expected(pack(attacker.bottom_from_embeddings(unpack(mixed, lengths), lengths), lengths))
        loss = ((given / deviation - target).square().sum(1) / sizes).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        logits.grad = gradient
        optimizer.step()
    return logits.detach()
