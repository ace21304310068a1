"""LAMP: TAG's text, changed move by move into one that matches the gradient better and reads better.

    cost of a text = 1 − cos(Jᵀ u(text), g_B) + λ · (mean −log p of its tokens under the pretrained model)

Moves, one at random for each text and round: another of TAG's candidates where it is least sure, two neighbours
swapped, one token moved elsewhere, two halves exchanged. A move stays if it lowers the cost. A decoder's gradients know
their places, so there is little that reordering could repair; and most of the prior is in TAG's own p_t.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from blindtune.audit.inputs.attacker import Attacker, chunks
from blindtune.audit.inputs.direct import read_by_head, shortlist_after_first
from blindtune.audit.inputs.observe import Observed
from blindtune.audit.inputs.registry import attack
from blindtune.audit.inputs.shortlist import Shortlist
from blindtune.audit.inputs.tag import TopGradient, next_shortlist, solve
from blindtune.models.split import padding_mask, unpack

PRIOR = 0.05
"""λ."""


@attack("LAMP", observes=("s_B", "gradients"), needs=("bottom", "trunk", "top", "public text"))
def lamp(observed: Observed, attacker: Attacker) -> Tensor:
    lengths = observed.lengths.to(attacker.device)
    labels = next_shortlist(observed, attacker)
    tokens = shortlist_after_first(labels, observed, attacker)
    texts = list(tokens.best.split(lengths.tolist()))
    listed = [
        Shortlist(ids, scores)
        for ids, scores in zip(tokens.ids.split(lengths.tolist()), tokens.scores.split(lengths.tolist()), strict=True)
    ]
    match = _GradientMatch(observed, labels.best, attacker)
    costs = match.costs(texts) + PRIOR * surprise(texts, attacker)
    for _ in range(attacker.budget.lamp_rounds):
        moved = [move(text, candidates) for text, candidates in zip(texts, listed, strict=True)]
        new_costs = match.costs(moved) + PRIOR * surprise(moved, attacker)
        better = new_costs < costs
        texts = [new if wins else old for old, new, wins in zip(texts, moved, better.tolist(), strict=True)]
        costs = torch.where(better, new_costs, costs)
    return torch.cat(texts)


def move(text: Tensor, candidates: Shortlist) -> Tensor:
    """A text `(L,)` after one random move. Its first token, which no gradient knows, stays."""
    length, text = len(text), text.clone()
    if length < 3:
        return text
    kind = int(torch.randint(4, ()))
    at = 1 + int(torch.randint(length - 2, ()))  # 1 … L − 2
    if kind == 0 and candidates.ids.shape[1] > 1:
        margins = (candidates.scores[1:, 0] - candidates.scores[1:, 1]).clamp(0.0, 10.0)
        place = 1 + int(torch.multinomial((-margins).exp(), 1))
        text[place] = candidates.ids[place, 1 + int(torch.randint(min(3, candidates.ids.shape[1] - 1), ()))]
    elif kind == 1:
        text[[at, at + 1]] = text[[at + 1, at]]
    elif kind == 2:
        rest = torch.cat([text[:at], text[at + 1 :]])
        to = 1 + int(torch.randint(length - 1, ()))
        text = torch.cat([rest[:to], text[at : at + 1], rest[to:]])
    else:
        text = torch.cat([text[:1], text[at + 1 :], text[1 : at + 1]])
    return text


def surprise(texts: list[Tensor], attacker: Attacker) -> Tensor:
    """Mean −log p of each text's tokens after its first under the whole pretrained model, `(B,)`."""
    lengths = torch.tensor([len(text) for text in texts], device=attacker.device)
    ids = unpack(torch.cat(texts), lengths)
    result: list[Tensor] = []
    for some, count in zip(ids.split(16), lengths.split(16), strict=True):
        mask = padding_mask(count, some.shape[1])
        with torch.no_grad():
            output = cast(Any, attacker.model.causal)(input_ids=some, attention_mask=mask, use_cache=False)
        losses = F.cross_entropy(output.logits[:, :-1].float().transpose(1, 2), some[:, 1:], reduction="none")
        result.append((losses * mask[:, 1:]).sum(1) / (count - 1).clamp_min(1))
    return torch.cat(result)


class _GradientMatch:
    """1 − cos(Jᵀ u, g_B) for texts, with the weight of each position's loss as TAG's labels have it."""

    def __init__(self, observed: Observed, labels: Tensor, attacker: Attacker) -> None:
        self._lengths = observed.lengths.to(attacker.device)
        self._gradients = observed.received_gradients
        self._head = attacker.head
        self._tops = [TopGradient(hidden, some, attacker) for hidden, some in chunks(observed.s_b, self._lengths)]
        read = read_by_head(observed, attacker)
        self._means = torch.cat([(part @ self._head.T).softmax(-1) @ self._head for part in read.split(256)])
        pulls = self._means - self._head[labels]  # (N, e)
        along = (solve(observed, attacker) * pulls).sum(1) / pulls.square().sum(1).clamp_min(1e-12)
        self._weights = along.clamp_min(0.0).unsqueeze(1)

    def costs(self, texts: list[Tensor]) -> Tensor:
        """`(B,)`."""
        following = torch.cat([torch.cat([text[1:], text[:1]]) for text in texts])
        last = torch.cumsum(self._lengths, 0) - 1
        pulls = self._weights * (self._means - self._head[following])
        pulls[last] = 0.0
        few = [part for part, _ in chunks(pulls, self._lengths)]
        given = torch.cat([top.backward(part) for top, part in zip(self._tops, few, strict=True)])
        text = torch.repeat_interleave(torch.arange(len(texts), device=given.device), self._lengths)

        def total(values: Tensor) -> Tensor:
            return torch.zeros(len(texts), device=values.device).index_add(0, text, values.sum(1))

        scale = self._gradients.norm().clamp_min(1e-30)
        received, given = self._gradients / scale, given / given.norm().clamp_min(1e-30)
        sizes = (total(received.square()) * total(given.square())).sqrt().clamp_min(1e-30)
        return 1 - total(received * given) / sizes
