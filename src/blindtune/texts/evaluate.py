"""Evaluates a causal language model on questions, by the likelihood of answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from blindtune.client import DeployedModel
from blindtune.data.questions import TokenizedQuestion
from blindtune.texts.model import CausalBatch


class Scorer(Protocol):
    """A model that computes the likelihood of texts: a `CutCausalLM` or a `DeployedScorer`."""

    def score(self, batch: CausalBatch) -> tuple[Tensor, Tensor]:
        """Returns the sum of log p over each text's scored tokens `(B,)`, in nats, and whether greedy decoding would
        generate them `(B,)`."""
        ...


class DeployedScorer:
    """Scores texts with tuned parts and the real trunk, on the provider's server."""

    def __init__(self, deployed: DeployedModel) -> None:
        self.deployed = deployed

    def score(self, batch: CausalBatch) -> tuple[Tensor, Tensor]:
        """See `Scorer`."""
        return self.deployed.score(batch.rows(), batch.starts.tolist())


def evaluate_questions(
    model: Scorer, questions: Sequence[TokenizedQuestion], *, tokens: int = 2048
) -> Iterator[tuple[int, dict[str, float]]]:
    """Scores answers by likelihood, as the LM evaluation harness does.

    Args:
        tokens: largest number of tokens in one pass, padding included.
    Yields:
        The number of questions so far, and their scores: `accuracy` (the likeliest continuation is right),
        `accuracy_norm` (the likeliest per character is right), and `loss`, mean −log p of the right continuations'
        tokens, in nats. The last scores are those of all questions.
    """
    right = normalised = 0
    loss, learned = 0.0, 0
    for number, question in enumerate(questions, 1):
        order = sorted(range(len(question.rows)), key=lambda i: len(question.rows[i]))
        scores = [0.0] * len(order)
        for part in _parts(order, [len(row) for row in question.rows], tokens):
            batch = CausalBatch.of([question.rows[i] for i in part], [question.starts[i] for i in part])
            with torch.no_grad():
                for index, value in zip(part, model.score(batch)[0].tolist(), strict=True):
                    scores[index] = value
        by_character = [score / max(1, n) for score, n in zip(scores, question.characters, strict=True)]
        right += scores.index(max(scores)) == question.answer
        normalised += by_character.index(max(by_character)) == question.answer
        loss -= scores[question.answer]
        learned += len(question.row) - question.start
        yield number, {"accuracy": right / number, "accuracy_norm": normalised / number, "loss": loss / learned}


def score_answers(
    model: Scorer, questions: Sequence[TokenizedQuestion], *, tokens: int = 2048
) -> Iterator[tuple[float, bool]]:
    """Yields for each question the mean −log p of its right continuation's tokens, in nats, and whether greedy decoding
    would generate that continuation.

    Args:
        tokens: largest number of tokens in one pass, padding included.
    """
    for part in _parts(list(range(len(questions))), [len(question.row) for question in questions], tokens):
        chosen = [questions[i] for i in part]
        batch = CausalBatch.of([question.row for question in chosen], [question.start for question in chosen])
        with torch.no_grad():
            likelihoods, greedy = model.score(batch)
        for question, value, memorized in zip(chosen, likelihoods.tolist(), greedy.tolist(), strict=True):
            yield -value / (len(question.row) - question.start), bool(memorized)


def _parts(order: list[int], lengths: list[int], tokens: int) -> list[list[int]]:
    """Divides indices, in their order, into batches of at most `tokens` tokens, padding included."""
    parts: list[list[int]] = [[]]
    for index in order:
        longest = max([lengths[i] for i in parts[-1]], default=0)
        if parts[-1] and (len(parts[-1]) + 1) * max(longest, lengths[index]) > tokens:
            parts.append([])
        parts[-1].append(index)
    return parts
