"""Multiple choice in one pass: the prompt once, all continuations behind it, each blind to the others.

The same numbers as `blindtune.texts.evaluate_questions` in a third of the tokens. It needs the whole model
here, so it is for experiments; what the codec and the noise do between the parts is done by hooks at the cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from blindtune.data.questions import TokenizedQuestion
from blindtune.models.cut.parts import Cut, decoder_of, layers_of

Change = Callable[[Tensor], Tensor]


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden


@dataclass(frozen=True)
class Tree:
    """A question's tokens as one row: `ids (L,)`, `places (L,)` in their texts, `branch (L,)` (−1 for the prompt).

    Attributes:
        reads, tokens, owners: `(T,)`, where each learned token is predicted, which it is, of which continuation.
    """

    ids: list[int]
    places: list[int]
    branch: list[int]
    reads: list[int]
    tokens: list[int]
    owners: list[int]

    @staticmethod
    def of(question: TokenizedQuestion) -> Tree:
        shared = _shared(question.rows, min(question.starts))
        tree = Tree(list(question.rows[0][:shared]), list(range(shared)), [-1] * shared, [], [], [])
        for number, (row, start) in enumerate(zip(question.rows, question.starts, strict=True)):
            offset = len(tree.ids) - shared
            for place in range(start, len(row)):
                tree.reads.append(place - 1 if place - 1 < shared else offset + place - 1)
                tree.tokens.append(row[place])
                tree.owners.append(number)
            rest = row[shared:-1]  # nothing is predicted from the last token
            tree.ids.extend(rest)
            tree.places.extend(range(shared, shared + len(rest)))
            tree.branch.extend([number] * len(rest))
        return tree


def _shared(rows: Sequence[Sequence[int]], most: int) -> int:
    count = 0
    while count < most and len({row[count] for row in rows}) == 1:
        count += 1
    return count


def pad_trees(trees: Sequence[Tree]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ids`, `places` `(B, L)`, `sees (B, 1, L, L)` and `real (B, L)`, the latter two boolean."""
    length = max(len(tree.ids) for tree in trees)

    def padded(rows: Iterable[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])

    ids, places = padded((t.ids for t in trees), 0), padded((t.places for t in trees), 0)
    branch = padded((t.branch for t in trees), -2)
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    same = (branch.unsqueeze(2) == branch.unsqueeze(1)) | (branch == -1).unsqueeze(1)
    alone = torch.eye(length, dtype=torch.bool)  # padding has to see something
    return ids, places, ((earlier & same) | alone).unsqueeze(1), branch != -2


class _BottomDone(Exception):
    """What is known after the bottom is all that was asked for."""


@dataclass
class Wire:
    """What happens to hidden states between the parts.

    Args:
        up, down: what the codec and the noise do on their way to the trunk and back.
        encode: tokens to those that are sent in their places; what that changes in s_A is given back to s_B.
    """

    up: Change = _unchanged
    down: Change = _unchanged
    encode: Change | None = None

    def __post_init__(self) -> None:
        self.real = torch.empty(0)
        """`(B, L)`, of the pass that runs: which places aren't padding."""
        self._own: Tensor | None = None
        self._alone = False

    @contextmanager
    def between(self, causal: nn.Module, cut: Cut) -> Generator[None]:
        """Hooks at both cuts of a model."""
        blocks = decoder_of(causal).layers
        last = layers_of(cast(Any, causal).config) - cut.top - 1
        handles = [
            blocks[cut.bottom - 1].register_forward_hook(self._leave),
            blocks[last].register_forward_hook(self._return),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, decoder: nn.Module, ids: Tensor, **given: Any) -> Tensor:
        """What the head reads `(B, L, d)`."""
        if self.encode is None:
            return decoder(input_ids=ids, **given).last_hidden_state
        self._alone = True
        try:
            decoder(input_ids=ids, **given)
        except _BottomDone:
            self._alone = False
        return decoder(input_ids=self.encode(ids), **given).last_hidden_state

    def _leave(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        if self._alone:
            self._own = output
            raise _BottomDone
        if self._own is not None:
            self._own = self._own - output
        return self._on_real(self.up, output)

    def _return(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        result = self._on_real(self.down, output)
        if self._own is not None:
            result, self._own = result + self._own, None
        return result

    def _on_real(self, change: Change, hidden: Tensor) -> Tensor:
        result = hidden.clone()
        result[self.real] = change(hidden[self.real])
        return result


@torch.no_grad()
def score_questions(
    causal: nn.Module,
    cut: Cut,
    questions: Sequence[TokenizedQuestion],
    *,
    wire: Wire | None = None,
    tokens: int | None = None,
) -> list[list[float]]:
    """log p of every continuation of every question.

    Args:
        causal: the whole model with its ends as tuned, and the trunk or an emulator between them.
        tokens: in one pass; what suits the device if None.
    """
    tokens = tokens or (16_384 if next(causal.parameters()).is_cuda else 1024)
    trees = [Tree.of(question) for question in questions]
    order = sorted(range(len(trees)), key=lambda i: len(trees[i].ids))
    scores: list[list[float]] = [[] for _ in trees]
    wire = wire or Wire()
    with wire.between(causal, cut):
        start = 0
        while start < len(order):
            count = 1
            while start + count < len(order) and (count + 1) * len(trees[order[start + count]].ids) <= tokens:
                count += 1
            some = order[start : start + count]
            for index, found in zip(some, _score(causal, [trees[i] for i in some], wire), strict=True):
                scores[index] = [sum(part) for part in found]
            start += count
    return scores


def _score(causal: nn.Module, trees: Sequence[Tree], wire: Wire) -> list[list[list[float]]]:
    device = next(causal.parameters()).device
    ids, places, sees, real = (tensor.to(device) for tensor in pad_trees(trees))
    wire.real = real
    mask = torch.where(sees, 0.0, torch.finfo(torch.float32).min)
    hidden = wire.run(decoder_of(causal), ids, position_ids=places, attention_mask=mask, use_cache=False)
    rows = torch.tensor([b for b, tree in enumerate(trees) for _ in tree.reads])
    reads = torch.tensor([read for tree in trees for read in tree.reads])
    targets = torch.tensor([token for tree in trees for token in tree.tokens], device=device)
    logits = cast(Any, causal).lm_head(hidden[rows, reads]).float()
    found = iter((-nn.functional.cross_entropy(logits, targets, reduction="none")).tolist())
    result: list[list[list[float]]] = []
    for tree in trees:
        parts: list[list[float]] = [[] for _ in range(max(tree.owners) + 1)]
        for owner in tree.owners:
            parts[owner].append(next(found))
        result.append(parts)
    return result


def hits(questions: Sequence[TokenizedQuestion], scores: Sequence[Sequence[float]]) -> dict[str, list[int]]:
    """1 for each question whose likeliest continuation (`accuracy`; by character, `accuracy_norm`) is right, else 0."""
    plain = [int(max(range(len(s)), key=s.__getitem__) == q.answer) for q, s in zip(questions, scores, strict=True)]
    by_character = [
        [score / max(1, n) for score, n in zip(s, q.characters, strict=True)]
        for q, s in zip(questions, scores, strict=True)
    ]
    normed = [
        int(max(range(len(s)), key=s.__getitem__) == q.answer) for q, s in zip(questions, by_character, strict=True)
    ]
    return {"accuracy": plain, "accuracy_norm": normed}
