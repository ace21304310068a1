"""LAMP: changes TAG's text in small steps that improve the match with the gradient and the likelihood of the text.

    cost of a text = 1 − cos(Jᵀ u(text), g_B) + λ · (mean −log p of its tokens under the pretrained model)

Each round makes one random change to every text: it replaces a token with another one of TAG's candidates, preferably
at an uncertain position, swaps two neighbours, moves one token, or swaps two segments. A change that lowers the cost is
kept. The gain over TAG is small: the gradients of a decoder depend on positions, so TAG's order is mostly right, and
TAG's p_t contains most of the prior.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from blindtune.audit.solvers import TINY
from blindtune.audit.texts.attacker import Attacker, chunks
from blindtune.audit.texts.direct import head_input, shortlist_after_first
from blindtune.audit.texts.observe import Observed
from blindtune.audit.texts.registry import attack
from blindtune.audit.texts.shortlist import Shortlist
from blindtune.audit.texts.tag import TopGradient, next_shortlist, solve
from blindtune.models.cut.parts import padding_mask, unpack

PRIOR = 0.05
"""λ."""


@attack("LAMP", observes=("s_B", "gradients"), needs=("bottom", "trunk", "top", "public text"))
def lamp(observed: Observed, attacker: Attacker) -> Tensor:
    lengths = observed.lengths.to(attacker.device)
    labels = next_shortlist(observed, attacker)
    tokens = shortlist_after_first(labels, observed, attacker)
    texts = list(tokens.best.split(lengths.tolist()))
    candidates_of = [
        Shortlist(ids, scores)
        for ids, scores in zip(tokens.ids.split(lengths.tolist()), tokens.scores.split(lengths.tolist()), strict=True)
    ]
    match = _GradientMatch(observed, labels.best, attacker)
    costs = match.costs(texts) + PRIOR * surprise(texts, attacker)
    for _ in range(attacker.budget.lamp_rounds):
        moved = [move(text, candidates) for text, candidates in zip(texts, candidates_of, strict=True)]
        new_costs = match.costs(moved) + PRIOR * surprise(moved, attacker)
        better = new_costs < costs
        texts = [new if keep else old for old, new, keep in zip(texts, moved, better.tolist(), strict=True)]
        costs = torch.where(better, new_costs, costs)
    return torch.cat(texts)


def move(text: Tensor, candidates: Shortlist) -> Tensor:
    """Returns a text `(L,)` with one random change. The first token stays, because gradients don't depend on it."""
    length, text = len(text), text.clone()
    if length < 3:
        return text
    kind = int(torch.randint(4, ()))
    at = 1 + int(torch.randint(length - 2, ()))  # 1 … L − 2
    if kind == 0 and candidates.ids.shape[1] > 1:
        margins = (candidates.scores[1:, 0] - candidates.scores[1:, 1]).clamp(0.0, 10.0)
        position = 1 + int(torch.multinomial((-margins).exp(), 1))
        text[position] = candidates.ids[position, 1 + int(torch.randint(min(3, candidates.ids.shape[1] - 1), ()))]
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
    """Returns the mean −log p of the tokens of each text, except the first, under the pretrained model, `(B,)`."""
    lengths = torch.tensor([len(text) for text in texts], device=attacker.device)
    ids = unpack(torch.cat(texts), lengths)
    result: list[Tensor] = []
    for part, count in zip(ids.split(16), lengths.split(16), strict=True):
        mask = padding_mask(count, part.shape[1])
        with torch.no_grad():
            output = cast(Any, attacker.model.causal)(input_ids=part, attention_mask=mask, use_cache=False)
        losses = F.cross_entropy(output.logits[:, :-1].float().transpose(1, 2), part[:, 1:], reduction="none")
        result.append((losses * mask[:, 1:]).sum(1) / (count - 1).clamp_min(1))
    return torch.cat(result)


class _GradientMatch:
    """Computes 1 − cos(Jᵀ u, g_B) of texts, where the weight of each position's loss is fitted to TAG's labels."""

    def __init__(self, observed: Observed, labels: Tensor, attacker: Attacker) -> None:
        self._lengths = observed.lengths.to(attacker.device)
        self._gradients = observed.received_gradients
        self._head = attacker.head
        self._tops = [TopGradient(hidden, part, attacker) for hidden, part in chunks(observed.s_b, self._lengths)]
        head_inputs = head_input(observed, attacker)
        self._means = torch.cat([(part @ self._head.T).softmax(-1) @ self._head for part in head_inputs.split(256)])
        pulls = self._means - self._head[labels]  # (N, e)
        along = (solve(observed, attacker) * pulls).sum(1) / pulls.square().sum(1).clamp_min(1e-12)
        self._weights = along.clamp_min(0.0).unsqueeze(1)

    def costs(self, texts: list[Tensor]) -> Tensor:
        """Returns 1 − cos(Jᵀ u, g_B) of each text, `(B,)`."""
        following = torch.cat([torch.cat([text[1:], text[:1]]) for text in texts])
        last = torch.cumsum(self._lengths, 0) - 1
        pulls = self._weights * (self._means - self._head[following])
        pulls[last] = 0.0
        parts = [part for part, _ in chunks(pulls, self._lengths)]
        gradients = torch.cat([top.backward(part) for top, part in zip(self._tops, parts, strict=True)])
        text_of = torch.repeat_interleave(torch.arange(len(texts), device=gradients.device), self._lengths)

        def total(values: Tensor) -> Tensor:
            return torch.zeros(len(texts), device=values.device).index_add(0, text_of, values.sum(1))

        received = self._gradients / self._gradients.norm().clamp_min(TINY)
        gradients = gradients / gradients.norm().clamp_min(TINY)
        sizes = (total(received.square()) * total(gradients.square())).sqrt().clamp_min(TINY)
        return 1 - total(received * gradients) / sizes
