"""A client of the cut server, and what tests ask of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from blindtune.client import Operator, RemoteTrunk
from blindtune.data.questions import Question, TokenizedQuestion
from blindtune.texts import CausalBatch, CutCausalLM, Design, Ends, TrainConfig, Trainer
from blindtune.training import TextsSummary

CONFIG = TrainConfig(steps=4, batch_size=4, learning_rate=0.01, warmup=1)
SUMMARY = TextsSummary(
    method="online",
    options={},
    model="llama",
    base_model_name="tiny",
    fingerprint="1" * 64,
    max_length=24,
    cut=(2, 2),
    tune="lora",
    rank=4,
    alpha=8,
    targets=None,
    parts=["bottom", "top"],
    fields={},
    emulator={"tensors_sha256": "2" * 64},
)


@dataclass
class Setup:
    """Ends, boundary and trunk of one client."""

    model: CutCausalLM
    ends: Ends
    design: Design
    train: list[TokenizedQuestion]
    trunk: RemoteTrunk
    operator: Operator

    def trainer(self, config: TrainConfig = CONFIG, **options: Any) -> Trainer:
        return Trainer(self.model, self.ends, self.design, self.train, config, **{"summary": SUMMARY, **options})


MakeSetup = Callable[..., Setup]


def questions(sentences: list[str]) -> list[Question]:
    """Which of two words ends a film review's sentence."""
    found: list[Question] = []
    for index, sentence in enumerate(sentences):
        words = sentence.split()
        if 6 <= len(words) <= 16 and len(found) < 24:
            found.append(Question(" ".join(words[:-1]), (" good", " bad"), index % 2))
    return found


def run(trainer: Trainer, steps: int | None = None) -> list[dict[str, float]]:
    """The losses of so many steps, or of all that are left."""
    losses: list[dict[str, float]] = []
    for step in trainer.steps():
        losses.append(step.losses)
        if len(losses) == steps:
            break
    return losses


def real(batch: CausalBatch) -> Tensor:
    """`(B, L)`: true where there is a token."""
    return torch.arange(batch.ids.shape[1]) < batch.lengths.unsqueeze(1)


def logits(causal: Any, batch: CausalBatch) -> Tensor:
    """Of a whole model."""
    with torch.no_grad():
        return causal(input_ids=batch.ids, attention_mask=real(batch).long()).logits[real(batch)]


def cut_logits(setup: Setup, batch: CausalBatch) -> Tensor:
    """Of a client's ends around the trunk."""
    with torch.no_grad():
        trunk_output = setup.model.through(setup.model.smash(batch), batch)
        hidden = setup.model.top(trunk_output, batch.lengths)
    return setup.model.top.logits(hidden).detach()[real(batch)]


def sent_in_a_step(setup: Setup, trainer: Trainer) -> list[Tensor]:
    """s_A `[N, d]` of each message of the next step, before the codec."""
    sent: list[Tensor] = []
    forward = setup.trunk.forward

    def call(packed: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(packed.detach().clone())
        return forward(packed, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup.trunk, "forward", call)
        run(trainer, 1)
    return sent
