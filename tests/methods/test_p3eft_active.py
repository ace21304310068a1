"""Operators that answer wrongly in order to learn more. Each of these attacks read labels from an earlier version.

They don't read what is hidden under noise. They ask whether two messages are equal, or whether one comes at all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from threading import RLock
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as F

from blindtune.client import Backbone, OperatorPool
from blindtune.methods import P3EFT, LinearHead, PrivateModel
from blindtune.models import FrozenBackbone
from blindtune.privacy.randomness import SecureGenerator
from blindtune.training import BatchPlan, Examples, TrainConfig, Trainer
from experiments.local import LocalOperator

BATCH = 8
Answer = Callable[[Any, Tensor], Tensor]


class Malicious(LocalOperator):
    """Notes what it is sent, and may change what it answers to a training step's question for h(x, 0)."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: list[tuple[str, str]] = []
        self.lie: Answer | None = None
        self.fail_backward = False

    def forward(self, tokens, uploads, pooling, seed, *, retain=False, want_hidden=True):
        if not retain:
            self.seen.append(("adapter", "".join(upload.sha256 for upload in uploads)))
        hidden = super().forward(tokens, uploads, pooling, seed, retain=retain, want_hidden=want_hidden)
        if retain and self.lie is not None and hidden is not None:
            return self.lie(tokens, hidden)
        return hidden

    def backward(self, tokens, uploads, pooling, seed, cotangents):
        share = cotangents.numpy().tobytes() if isinstance(cotangents, Tensor) else cotangents.seed.encode()
        self.seen.append(("share", str(hash(share))))
        if self.fail_backward:
            self.fail_backward = False
            raise ConnectionError("500")
        return super().backward(tokens, uploads, pooling, seed, cotangents)

    def pattern(self, since: int) -> list[tuple[str, int]]:
        """What it was sent, with equal messages under equal numbers: all that equality can tell."""
        numbers: dict[str, int] = {}
        return [(kind, numbers.setdefault(name, len(numbers))) for kind, name in self.seen[since:]]


class Victim:
    """A client with private labels over two operators, the first of which is malicious."""

    def __init__(self, backbone: FrozenBackbone, folder: Path, texts: list[str], labels: list[int], **options: Any):
        lock = RLock()
        pool = OperatorPool([Malicious(backbone, folder / name, lock) for name in "ab"])  # type: ignore[list-item]
        self.operator: Malicious = pool.operators[0]  # type: ignore[assignment]
        client = Backbone(pool, adapter=LoraConfig(r=4, lora_alpha=8), max_length=32, num_adapters=0)
        method = P3EFT(steps=50, batch_size=BATCH, check_every=0)
        self.model = PrivateModel(
            client, LinearHead(client.hidden_size, 2), method, generator=SecureGenerator(), **options
        )
        config = TrainConfig(steps=50, batch_size=BATCH)
        self.trainer = Trainer(self.model, Examples(texts, labels, ["no", "yes"]), config)
        self.trainer.prepare()

    def first_batch(self) -> list[int]:
        return BatchPlan([len(row) for row in self.trainer.rows], BATCH, 0).batch(0)


@pytest.fixture(scope="module")
def world(tiny_backbone, film_sentences) -> tuple[FrozenBackbone, list[str], list[int]]:
    texts, chance = [str(text) for text in film_sentences[:64]], random.Random(5)
    return tiny_backbone("bert"), texts, [chance.randint(0, 1) for _ in texts]


def test_a_gradient_of_zero_does_not_show_in_the_next_adapter(world, tmp_path):
    """The operator knows all labels but one, and answers so that its guess would be fitted perfectly: then the gradient
    is zero, and the adapter of the next step is what it was. It used to travel as the same bytes, free of charge."""
    backbone, texts, labels = world
    patterns, messages = [], []
    for label in (0, 1):
        victim = Victim(backbone, tmp_path / str(label), texts, list(labels))
        target = victim.first_batch()[3]
        victim = Victim(backbone, tmp_path / f"{label}+", texts, [*labels[:target], label, *labels[target + 1 :]])
        guess = torch.tensor([*labels[:target], 0, *labels[target + 1 :]])
        features = victim.model.backbone.frozen(texts)
        head = LinearHead(features.shape[1], 2)
        head.fit(features, guess)
        along = ((head.linear.weight[1] - head.linear.weight[0]) / head.scale).detach()
        known = {row.ids: sign for row, sign in zip(victim.trainer.rows, (2.0 * guess - 1).tolist(), strict=True)}

        def lie(tokens, hidden, known=known, head=head, along=along):
            ids = [tuple(i[:n]) for i, n in zip(tokens.input_ids.tolist(), tokens.lengths.tolist(), strict=True)]
            signs = torch.tensor([known[row] for row in ids])
            return (head.mean + 1e8 * signs[:, None] * along / along.norm()).reshape(hidden.shape)

        victim.operator.lie = lie
        since, steps = len(victim.operator.seen), victim.trainer.steps()
        losses = [next(steps).losses["task"] for _ in range(2)]
        assert (losses[0] < 1e-6) == (label == 0), "the lie works: its guess is fitted, and nothing else"
        patterns.append(victim.operator.pattern(since))
        messages.append(victim.model.method.ledger.messages("adapter"))
    assert patterns[0] == patterns[1] == [("adapter", 0), ("share", 1), ("adapter", 2), ("share", 3)]
    assert messages[0] == messages[1] == 2


def test_a_step_that_the_operator_makes_fail_is_not_an_oracle(world, tmp_path):
    """It fails the backward call, and answers otherwise when the step is repeated. Whether the gradient changed, and so
    a label, used to show in whether the share was the same."""
    backbone, texts, labels = world
    patterns = []
    for flip in (False, True):
        victim = Victim(backbone, tmp_path / str(flip), texts, [1 - label if flip else label for label in labels])
        victim.operator.fail_backward = True
        since, steps = len(victim.operator.seen), victim.trainer.steps()
        with pytest.raises(ConnectionError):
            next(steps)
        victim.operator.lie = lambda tokens, hidden: hidden * 1e4
        next(victim.trainer.steps())
        patterns.append(victim.operator.pattern(since))
    assert patterns[0] == patterns[1]
    assert len({name for kind, name in patterns[0] if kind == "share"}) == 2


def test_a_loss_that_is_made_to_explode_does_not_break_the_run_off(world, tmp_path):
    """Finite hidden states that overflow in the head, if its weights are what the operator thinks they are."""
    backbone, texts, labels = world
    patterns = []
    for size in (1.0, 1e38):
        victim = Victim(backbone, tmp_path / str(size), texts, labels)
        head = victim.model.head

        def lie(tokens, hidden, size=size, head=head):
            sign = (head.linear.weight[1] - head.linear.weight[0]).sign().detach()
            return (3.0 * size * sign * head.scale.sign()).expand(hidden.shape).clone()

        victim.operator.lie = lie
        with torch.no_grad():
            head.linear.weight.mul_(50)
        since, steps = len(victim.operator.seen), victim.trainer.steps()
        for _ in range(3):
            next(steps)
        lost = victim.model.method.report().get("nonfinite_messages", 0)
        assert (lost > 0) == (size > 1)
        patterns.append(victim.operator.pattern(since))
    assert patterns[0] == patterns[1]


@pytest.mark.parametrize("gain", [1.0, 600.0])
def test_labels_that_are_fitted_leave_no_trace_under_a_loss_that_reaches_zero(world, tmp_path, gain):
    """An honest operator, and a hinge loss, whose gradient is exactly zero once all labels are fitted."""
    backbone, texts, labels = world
    patterns = []
    for own in (labels, [1 - labels[0], *labels[1:]]):
        victim = Victim(backbone, tmp_path / str(own[0]), texts[:16], own[:16], loss=F.multi_margin_loss)
        with torch.no_grad():
            victim.model.head.linear.weight.mul_(gain)
        since, steps = len(victim.operator.seen), victim.trainer.steps()
        for _ in range(4):
            next(steps)
        patterns.append(victim.operator.pattern(since))
    assert patterns[0] == patterns[1]
    assert len(set(patterns[0])) == len(patterns[0]) == 8
