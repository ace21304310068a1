"""Operators that answer wrongly in order to learn more. Each of these attacks read labels from an earlier version.

They don't read what is hidden under noise. They ask whether two messages are equal, or whether one comes at all.
"""

from __future__ import annotations

import itertools
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import RLock
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as F

from blindtune.client import Backbone, Operator, OperatorPool, Transport
from blindtune.data import BatchPlan, Examples
from blindtune.errors import BudgetSpent, LabelDependentBatches
from blindtune.labels import LinearHead, PaddedLoRA, PrivateModel
from blindtune.labels.trainer import TrainConfig, Trainer
from blindtune.local import InProcess
from blindtune.models import FrozenBackbone
from blindtune.privacy.accountant import mu_of
from blindtune.privacy.randomness import SecureGenerator
from blindtune.server import ServerSettings, create_app
from blindtune.wire import AdapterUpload, decode

BATCH = 8
Answer = Callable[[Any, Tensor], Tensor]


class Malicious(Operator):
    """An operator in this process that notes what it is sent, and may change its answer to a request for h(x, 0)."""

    def __init__(self, backbone: FrozenBackbone, record: Path, lock: Any) -> None:
        app = create_app({"model": backbone}, ServerSettings(record=record, log_requests=False))
        super().__init__(Transport(f"http://{record.name}", http=InProcess(app, lock)), None)
        self.seen: list[tuple[str, str]] = []
        self.adapters: dict[str, Tensor] = {}
        self.lie: Answer | None = None
        self.fail_backward = False

    def forward(self, tokens, uploads, readout, seed, *, retain=False, codec="fp32"):
        if not retain:
            self.seen.append(("adapter", "".join(upload.sha256 for upload in uploads)))
            self.adapters |= {upload.sha256: decode(upload.body, AdapterUpload)[1]["weights"] for upload in uploads}
        hidden = super().forward(tokens, uploads, readout, seed, retain=retain, codec=codec)
        if retain and self.lie is not None and hidden is not None:
            return self.lie(tokens, hidden)
        return hidden

    def backward(self, tokens, uploads, readout, seed, cotangents):
        share = cotangents.numpy().tobytes() if isinstance(cotangents, Tensor) else cotangents.seed.encode()
        self.seen.append(("share", str(hash(share))))
        if self.fail_backward:
            self.fail_backward = False
            raise ConnectionError("500")
        return super().backward(tokens, uploads, readout, seed, cotangents)

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
        method = PaddedLoRA(steps=50, batch_size=BATCH, check_every=0)
        self.model = PrivateModel(
            client, LinearHead(client.hidden_size, 2), method, generator=SecureGenerator(), **options
        )
        config = TrainConfig(steps=50, batch_size=BATCH)
        self.trainer = Trainer(self.model, Examples(texts, labels, ["no", "yes"]), config)
        self.trainer.prepare()

    def first_batch(self) -> list[int]:
        return BatchPlan([len(row) for row in self.trainer.rows], BATCH, 0).batch(0)


def fits(model: PrivateModel, texts: list[str], guess: list[int]) -> Answer:
    """Hidden states that fit a guess of all labels, so that the gradient is zero if it is right."""
    head = LinearHead(model.backbone.hidden_size, 2)
    head.fit(model.backbone.frozen(texts), torch.tensor(guess))
    along = ((head.linear.weight[1] - head.linear.weight[0]) / head.scale).detach()
    known = {row.ids: 2.0 * g - 1 for row, g in zip(model.backbone.rows(texts), guess, strict=True)}

    def answer(tokens: Any, hidden: Tensor) -> Tensor:
        ids = [tuple(i[:n]) for i, n in zip(tokens.input_ids.tolist(), tokens.lengths.tolist(), strict=True)]
        signs = torch.tensor([known[row] for row in ids])
        return (head.mean + 1e8 * signs[:, None] * along / along.norm()).reshape(hidden.shape)

    return answer


def with_label(labels: list[int], label: int, place: int = 3) -> list[int]:
    return [*labels[:place], label, *labels[place + 1 :]]


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
        victim = Victim(backbone, tmp_path / f"{label}+", texts, with_label(labels, label, target))
        victim.operator.lie = fits(victim.model, texts, with_label(labels, 0, target))
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


class Sessions:
    """One run after the other on the same checkpoints, each over servers that may be restarted or moved."""

    def __init__(self, backbone: FrozenBackbone, folder: Path, texts: list[str]):
        self.backbone, self.folder, self.texts = backbone, folder, texts
        self.count = 0
        self.seen: list[tuple[str, str]] = []
        self.operators: list[Malicious] = []

    def pool(self, places: dict[str, str]) -> OperatorPool:
        """Servers by name, at these addresses."""
        self.count, lock = self.count + 1, RLock()
        self.operators = [Malicious(self.backbone, self.folder / f"{name}{self.count}", lock) for name in places]
        for operator, (name, url) in zip(self.operators, places.items(), strict=True):
            operator.id, operator.transport.url = name, url
            operator.seen = self.seen if name == "a" else []
        return OperatorPool(self.operators)  # type: ignore[arg-type]

    def client(self, places: dict[str, str] | None = None) -> Backbone:
        pool = self.pool(places or {"a": "https://1.example", "b": "https://2.example"})
        return Backbone(pool, adapter=LoraConfig(r=4, lora_alpha=8), max_length=32, num_adapters=0)

    def start(self, labels: list[int], **options: Any) -> PrivateModel:
        client = self.client()
        method = PaddedLoRA(steps=50, batch_size=BATCH, check_every=0, predictions=5)
        model = PrivateModel(client, LinearHead(client.hidden_size, 2), method, **options)
        model.prepare(self.texts, labels)
        return model

    def load(self, name: str, places: dict[str, str] | None = None) -> PrivateModel:
        return PrivateModel.from_pretrained(self.folder / name, self.client(places))

    def predict(self, model: PrivateModel) -> None:
        model.eval()
        with torch.no_grad():
            model.backbone.infer(self.texts[:4])

    def step(
        self,
        model: PrivateModel,
        labels: list[int],
        after_backward: Callable[[], None] = lambda: None,
        fused: bool = False,
    ) -> None:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0, fused=fused)
        loss = model(self.texts[:BATCH], labels[:BATCH]).loss
        assert loss is not None
        loss.backward()
        after_backward()
        optimizer.step()

    def pattern(self) -> list[tuple[str, int]]:
        numbers: dict[str, int] = {}
        return [(kind, numbers.setdefault(name, len(numbers))) for kind, name in self.seen]


def under_attack(world, folder: Path, label: int) -> tuple[Sessions, PrivateModel, list[int]]:
    """A run whose first operator makes the gradient zero if one label is 0; and all labels, with this one."""
    backbone, texts, labels = world
    sessions, own = Sessions(backbone, folder, texts), with_label(labels, label)
    model = sessions.start(own)
    sessions.operators[0].lie = fits(model, texts, with_label(labels, 0))
    sessions.seen.clear()
    return sessions, model, own


def values(model: PrivateModel) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.backbone.parameters()]


def put(model: PrivateModel, those: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(model.backbone.parameters(), those, strict=True):
            parameter.copy_(value)


def test_a_server_at_the_others_address_gets_no_other_half_of_the_same_pad(world, tmp_path):
    """Tunnels that were opened in the other order. One server got p + δ/2s and p − δ/2s."""
    backbone, texts, labels = world
    sessions = Sessions(backbone, tmp_path, texts)
    model = sessions.start(labels)
    with torch.no_grad():
        model.head.linear.weight.mul_(50)
    sessions.step(model, labels)
    model.save_pretrained(tmp_path / "out")
    delta = model.backbone.lora_adapters()[0].vector().detach().double()
    received: list[Tensor] = []
    spent: list[float] = []
    for places in (("a", "b"), ("a", "b"), ("b", "a")):
        urls = dict(zip(places, ("https://1.example", "https://2.example"), strict=True))
        model = sessions.load("out", urls)
        sessions.predict(model)
        received += [
            weights.double().flatten()
            for operator in sessions.operators
            if operator.id == "a"
            for weights in operator.adapters.values()
            if weights.any()
        ]
        spent.append(model.method.ledger.allowance())
    assert spent[0] < spent[1] < spent[2], "each has a pad of its own"
    batch = model.backbone.batch(model.backbone.rows(texts[:1]), (0, 1), None)
    scale = model.method.channel.scale(batch).amplification
    for one, other in itertools.combinations(received, 2):
        assert abs(float(F.cosine_similarity(scale * (one - other), delta, 0))) < 0.2


def test_predictions_before_and_after_a_step_are_always_two_messages(world, tmp_path):
    """Load, predict, step, save, load, predict: where the step changed nothing, nothing was sent the second time."""
    backbone, texts, labels = world
    patterns, messages = [], []
    for label in (0, 1):
        sessions = Sessions(backbone, tmp_path / str(label), texts)
        own = with_label(labels, label)
        sessions.start(own).save_pretrained(sessions.folder / "out")
        model = sessions.load("out")
        sessions.seen.clear()
        sessions.predict(model)
        sessions.operators[0].lie = fits(model, texts, with_label(labels, 0))
        before = model.backbone.lora_adapters()[0].vector().clone()
        sessions.step(model, own)
        assert torch.equal(model.backbone.lora_adapters()[0].vector(), before) == (label == 0), "the lie works"
        model.save_pretrained(sessions.folder / "out")
        model = sessions.load("out")
        sessions.predict(model)
        patterns.append(sessions.pattern())
        messages.append(model.method.ledger.messages("adapter"))
    assert patterns[0] == patterns[1]
    assert messages[0] == messages[1]


@pytest.mark.parametrize("way", ["evaluated before the step", "evaluated before a fused step", "averaged weights"])
def test_a_loop_of_ones_own_may_ask_between_any_two_writes(world, tmp_path, way):
    """Two adapters in what was one period; whether they are equal depends on a label."""
    patterns = []
    for label in (0, 1):
        sessions, model, own = under_attack(world, tmp_path / str(label), label)
        average = values(model)
        for _ in range(2):
            if way != "averaged weights":
                sessions.step(model, own, lambda: sessions.predict(model), fused="fused" in way)  # noqa: B023
                continue
            sessions.step(model, own)
            current = values(model)
            average = [mean.lerp_(value, 0.1) for mean, value in zip(average, current, strict=True)]
            put(model, average)
            sessions.predict(model)
            put(model, current)
        patterns.append(sessions.pattern())
    assert patterns[0] == patterns[1]


def test_a_write_that_torch_does_not_see_shows_to_nobody_but_the_client(world, tmp_path, caplog):
    """Averages that are put in place through `.data`: whether they differ depends on a label."""
    patterns = []
    for label in (0, 1):
        sessions, model, own = under_attack(world, tmp_path / str(label), label)
        sessions.step(model, own)
        sessions.predict(model)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for parameter in model.backbone.parameters():
                parameter.data.copy_(parameter.data * 0.5)
            sessions.predict(model)
        assert ("torch doesn't see" in caplog.text) == (label == 1)
        assert ("unseen_writes" in model.method.report()) == (label == 1)
        patterns.append(sessions.pattern())
    assert patterns[0] == patterns[1]


@pytest.mark.parametrize("way", ["saved", "copied", "through .data", "in inference mode", "a crash while saving"])
def test_two_predictions_are_two_messages_whether_or_not_checkpoints_are_equal(world, tmp_path, way):
    """However the second adapter takes the place of the first."""
    patterns = []
    for label in (0, 1):
        sessions, model, own = under_attack(world, tmp_path / str(label), label)
        before = values(model)
        sessions.step(model, own)
        model.save_pretrained(sessions.folder / "last")
        put(model, before)
        model.save_pretrained(sessions.folder / "first")
        sessions.seen.clear()
        sessions.predict(sessions.load("last"))
        if way == "a crash while saving":  # before the file that is written after it
            name = "adapter_model.safetensors"
            shutil.copy(sessions.folder / "first" / name, sessions.folder / "last" / name)
        with torch.inference_mode(way == "in inference mode"):
            again = sessions.load("first" if way == "saved" else "last")
            if way in ("copied", "in inference mode"):
                put(again, before)
            for parameter, value in zip(again.backbone.parameters(), before, strict=True):
                if way == "through .data":
                    parameter.data.copy_(value)
            sessions.predict(again)
        patterns.append(sessions.pattern())
    assert patterns[0] == patterns[1]
    assert len({number for _, number in patterns[0]}) == 3, "two messages, and the public zero"


def test_what_else_is_trained_in_this_process_begins_no_period(world, tmp_path):
    """A local model that stops early: whether it makes a step depends on labels, and tells nobody."""
    patterns = []
    for label in (0, 1):
        sessions, model, _ = under_attack(world, tmp_path / str(label), label)
        weights = torch.nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.SGD([weights], lr=1.0)
        sessions.predict(model)
        if label:
            weights.grad = torch.ones(3)
            optimizer.step()
        sessions.predict(model)
        patterns.append(sessions.pattern())
    assert patterns[0] == patterns[1]


def test_an_adapter_that_exploded_is_loaded_and_sent_as_zeros(world, tmp_path):
    """An error after a crash would tell that it has exploded."""
    backbone, texts, labels = world
    sessions = Sessions(backbone, tmp_path, texts)
    model = sessions.start(labels)
    with torch.no_grad():
        next(p for p in model.backbone.parameters() if p.requires_grad).fill_(float("nan"))
    model.save_pretrained(tmp_path / "out")
    again = sessions.load("out")
    sessions.predict(again)
    assert again.method.channel.nonfinite == 1


def test_two_branches_of_a_checkpoint_never_send_the_same_bytes(world, tmp_path):
    """They did where the same secrets met the same noise: whether they are the same depends on labels."""
    backbone, texts, labels = world
    for label in (0, 1):
        own = with_label(labels, label)
        first = Sessions(backbone, tmp_path / str(label), texts)
        first.start(own, loss=F.multi_margin_loss).save_pretrained(first.folder / "out")
        sent: list[set[str]] = []
        for _ in range(2):
            model = first.load("out")
            model.loss = F.multi_margin_loss
            first.operators[0].lie = fits(model, texts, with_label(labels, 0))
            first.seen.clear()
            first.step(model, own)
            sent.append({name for kind, name in first.seen if kind == "share" or name})
        assert len(sent[0]) == len(sent[1]) == 2
        assert not sent[0] & sent[1]


def test_branches_of_a_checkpoint_share_one_budget(world, tmp_path):
    """A checkpoint that was saved on the way and goes on later: its ledger knew nothing of what came after it."""
    backbone, texts, labels = world
    sessions = Sessions(backbone, tmp_path, texts)
    client = sessions.client()
    method = PaddedLoRA(steps=6, batch_size=BATCH, check_every=0, predictions=1)
    model = PrivateModel(client, LinearHead(client.hidden_size, 2), method, ledger=tmp_path / "out")
    model.prepare(texts, labels)
    for _ in range(3):
        sessions.step(model, labels)
    model.save_pretrained(tmp_path / "best")
    steps: list[str] = []
    for name in ("out", "best"):
        model = sessions.load("best") if name == "best" else model
        with pytest.raises(BudgetSpent):  # noqa: PT012 - after some of them
            for _ in range(20):
                sessions.step(model, labels)
                steps.append(name)
    assert 3 <= len(steps) <= 7
    assert set(steps) == {"out"}
    shares = {name for kind, name in sessions.seen if kind == "share"}
    assert len(shares) * BATCH / method.backprop.noise_ratio**2 <= model.method.ledger.limit * (1 + 1e-9)
    assert model.method.ledger.guarantee().mu <= 0.25 * (1 + 1e-9)
    assert mu_of(model.method.ledger.allowance()) > 0.2
    assert [round(run.mu, 6) for run in model.history.earlier(texts) if run.run == model.run] == [
        round(model.method.ledger.guarantee().mu or 0.0, 6)
    ]


def test_our_own_loop_is_never_broken_off_for_labels_that_fit_its_batches(world, film_sentences, tmp_path):
    """Its batches are public. A labeling that looks as if batches were stratified by it must not show."""
    backbone, texts = world[0], list(dict.fromkeys(str(text) for text in film_sentences[:400]))[:320]
    strange = [number % 2 for number in range(len(texts))]
    order = BatchPlan([len(row) for row in Victim(backbone, tmp_path / "0", texts, strange).trainer.rows], BATCH, 0)
    for step in range(len(texts) // BATCH):
        for place, index in enumerate(order.batch(step)):
            strange[index] = place % 2
    victim = Victim(backbone, tmp_path / "1", texts, strange)
    steps = victim.trainer.steps()
    for _ in range(len(texts) // BATCH):
        next(steps)
    monitored = Sessions(backbone, tmp_path / "2", texts)
    model = monitored.start(strange)
    with pytest.raises(LabelDependentBatches):  # noqa: PT012 - the same batches in a loop that is watched
        for step in range(len(texts) // BATCH):
            model([texts[index] for index in order.batch(step)], [strange[index] for index in order.batch(step)])
