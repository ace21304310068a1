"""Evaluation by likelihood: of a model that says what it is told to, and of a cut model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from blindtune.data.questions import TokenizedQuestion
from blindtune.texts import CausalBatch, evaluate_questions
from tests.conftest import CutServer
from tests.texts.client import MakeSetup


class Told:
    """log p by a text's last token."""

    def __init__(self, scores: dict[int, float]) -> None:
        self.scores = scores

    def score(self, batch: CausalBatch) -> tuple[Tensor, Tensor]:
        values = [self.scores[row[-1]] for row in batch.rows()]
        return torch.tensor(values), torch.zeros(len(values), dtype=torch.bool)


def question(answer: int, *continuations: tuple[int, int, int]) -> TokenizedQuestion:
    """A prompt of two tokens, and continuations: their tokens' number, the last of them, and characters."""
    rows = tuple((1, 2, *[3] * (number - 1), last) for number, last, _ in continuations)
    return TokenizedQuestion(rows, (2,) * len(rows), tuple(c for *_, c in continuations), answer)


def test_the_likeliest_and_the_likeliest_by_character():
    model = Told({10: -4.0, 11: -3.0, 20: -1.0, 21: -2.0, 30: -8.0, 31: -6.0, 32: -9.0})
    questions = [
        question(0, (3, 10, 8), (1, 11, 2)),  # -4 < -3, but -0.5 > -1.5 by character
        question(0, (1, 20, 1), (2, 21, 4)),  # -1 > -2, but -1.0 < -0.5
        question(2, (2, 30, 4), (1, 31, 2), (4, 32, 18)),  # -9 is the least, but -0.5 > -2 and -3
    ]
    for tokens in (2048, 1):  # all in one pass, each in its own
        found = dict(evaluate_questions(model, questions, tokens=tokens))
        assert found[1] == {"accuracy": 0.0, "accuracy_norm": 1.0, "loss": 4 / 3}
        assert found[2] == {"accuracy": 1 / 2, "accuracy_norm": 1 / 2, "loss": 5 / 4}
        assert found[3] == {"accuracy": 1 / 3, "accuracy_norm": 2 / 3, "loss": 14 / 8}


def test_evaluation_by_likelihood(setup: MakeSetup, cut_server: CutServer) -> None:
    ours = setup()
    *_, (count, scores) = evaluate_questions(ours.model, ours.train)
    causal: Any = AutoModelForCausalLM.from_pretrained(cut_server.model)
    right = 0
    for question in ours.train:
        values: list[float] = []
        for row, start in zip(question.rows, question.starts, strict=True):
            with torch.no_grad():
                chances = causal(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
            values.append(sum(float(chances[t - 1, row[t]]) for t in range(start, len(row))))
        right += values.index(max(values)) == question.answer
    assert count == len(ours.train)
    assert scores["accuracy"] == right / count
