"""Padded LoRA over real operators: what the client gets back, and what each of them has recorded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from blindtune.client import Backbone
from blindtune.data import Examples
from blindtune.errors import BudgetSpent, ConfigError, SingleOperator
from blindtune.labels import (
    LinearHead,
    PaddedAdapters,
    PaddedLoRA,
    PrivateBackprop,
    PrivateBackpropOptions,
    PrivateModel,
    adapter_config,
    make_method,
)
from blindtune.labels.channels.integrity import IntegrityCheck
from blindtune.labels.channels.padded import PadPlan
from blindtune.labels.metrics import scores
from blindtune.labels.trainer import TrainConfig, Trainer, evaluate, predict
from blindtune.models import FrozenBackbone, LoraLayout, Tokens
from blindtune.privacy.accountant import allowance, mu_of
from blindtune.privacy.ledger import Ledger
from blindtune.privacy.randomness import SecureGenerator
from blindtune.wire import AdapterUpload, Transcript, decode
from tests.conftest import several
from tests.models.test_lora import error

KEY = bytes(range(32))
LAYERS = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
SCALING = 2.0
STEPS = 6
RATE = 5e-3
SMALL_PADS = {"steps": 4, "pad_spread": 0.005, "max_mu": 200.0}
"""Whatever the pads are, the tangent is nearly that at the pretrained model."""


LOOSE = {"max_mu": 20.0}
"""Little amplification: what is asked isn't how operators round."""


def start(backbone: Backbone, method: PaddedLoRA, *, key: bytes = KEY, **options: Any) -> PrivateModel:
    torch.manual_seed(0)
    head = LinearHead(backbone.hidden_size, 2)
    return PrivateModel(backbone, head, method, generator=SecureGenerator(key), **options)


def delta(backbone: Backbone) -> Tensor:
    """The secret update `(P,)`."""
    return backbone.lora_adapters()[0].vector().detach().clone()


def move(backbone: Backbone, length: float, seed: int = 0) -> Tensor:
    """Sets the secret update to one of this norm."""
    matrices = backbone.lora_adapters()[0].named_matrices()
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(b.shape, generator=generator) for name, (_, b) in matrices.items()}
    norm = math.sqrt(sum(float(b.square().sum()) for b in drawn.values()))
    with torch.no_grad():
        for name, (_, b) in matrices.items():
            b.copy_(drawn[name] * length / norm)
    return delta(backbone)


def tokens_of(backbone: Backbone, texts: Sequence[str]) -> Tokens:
    return backbone.tokenizer.pad(backbone.rows(texts))


@dataclass
class Seen:
    """What one operator received between two moments: adapters in the order of arrival, and its calls."""

    adapters: dict[str, Tensor] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)
    """Kind, and the hash of the one adapter that it was for."""

    @property
    def padded(self) -> list[Tensor]:
        """All adapters but the public one that changes nothing."""
        return [weights.double() for weights in self.adapters.values() if torch.count_nonzero(weights)]

    @property
    def zero(self) -> list[str]:
        return [name for name, weights in self.adapters.items() if not torch.count_nonzero(weights)]


def seen(transcript: Transcript, begin: float, end: float) -> Seen:
    found = Seen()
    for event in transcript.events:
        if not begin <= event.time <= end:
            continue
        if event.kind == "adapter":
            found.adapters.setdefault(event.adapters[0], transcript.tensors(event)["weights"])
        elif event.adapters:
            (adapter,) = event.adapters
            found.calls.append((event.kind, adapter))
    return found


@dataclass
class Run:
    """A short training run: the client's secrets, and after the servers' end what each operator has recorded."""

    scale: Any
    deltas: list[Tensor]
    """δ_0 … δ_T."""
    begin: float
    end: float
    seen: list[Seen] = field(default_factory=list)


def train(urls: list[str], texts: list[str], labels: list[int], method: PaddedLoRA, key: bytes) -> Run:
    """`STEPS` steps on all texts, an evaluation after each second one and at the end.

    The head is not fitted before: it would have opposite weights for opposite labels, and adapters equal gradients.
    """
    begin = time.time()
    backbone = Backbone(urls, adapter=LAYERS, max_length=32)
    model = start(backbone, method, key=key)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    deltas = [delta(backbone)]
    for step in range(STEPS):
        optimizer.zero_grad()
        model(texts, labels).loss.backward()
        optimizer.step()
        deltas.append(delta(backbone))
        if step % 2 or step == STEPS - 1:
            predict(model, texts[:9])
    scale = method.channel.scale(backbone.batch(backbone.rows(texts), (0, 1), None))
    backbone.close()
    return Run(scale, deltas, begin, time.time())


@pytest.fixture(scope="module")
def runs(film_examples, tiny_models, tmp_path_factory) -> dict[str, Run]:
    """Three runs over the same two operators: as it should be, with opposite labels, and without real pads."""
    texts, labels = [str(text) for text in film_examples.texts[:24]], film_examples.labels[:24]
    folder = tmp_path_factory.mktemp("recorded")
    found: dict[str, Run] = {}
    with ExitStack() as stack:
        servers = [
            stack.enter_context(several(1, tiny_models["bert"], tmp_path_factory, record=folder / name))[0]
            for name in "ab"
        ]
        urls = [server.url for server in servers]
        plain = {"steps": STEPS, "check_every": 0, "predictions": 0}
        found["true"] = train(urls, texts, labels, PaddedLoRA(**plain), b"1" * 32)
        found["opposite"] = train(urls, texts, [1 - label for label in labels], PaddedLoRA(**plain), b"2" * 32)
        bare = PaddedLoRA(**plain, pad_spread=1e-6, max_mu=5000.0, max_norm=4.0)
        found["bare"] = train(urls, texts, labels, bare, b"3" * 32)
    for run in found.values():
        run.seen = [seen(Transcript(folder / name), run.begin, run.end) for name in "ab"]
    return found


class TestWhatOperatorsSee:
    def test_is_one_padded_adapter_for_each_update_and_a_public_one(self, runs):
        """An evaluation and the step after it are one view."""
        run = runs["true"]
        assert len({d.numpy().tobytes() for d in run.deltas}) == STEPS + 1
        for operator in run.seen:
            assert len(operator.padded) == STEPS + 1
            assert len(operator.zero) == 1

    def test_gradients_are_taken_where_nothing_depends_on_labels(self, runs):
        for run in runs.values():
            for operator in run.seen:
                backward = [adapter for kind, adapter in operator.calls if kind == "backward"]
                assert backward == operator.zero * STEPS

    def test_is_half_of_a_pair_and_never_both_halves(self, runs):
        """Two adapters of one operator have independent pads; only both halves of one pad give an update."""
        run = runs["true"]
        one, other = (operator.padded for operator in run.seen)
        for truth, plus, minus in zip(run.deltas, one, other, strict=True):
            found = (plus - minus) * run.scale.amplification
            assert float((found - truth.double()).norm()) < 1e-2 * max(1.0, float(truth.norm()))
        for mine in (one, other):
            for left, right in combinations(mine, 2):
                assert float((left - right).std()) == pytest.approx(2**0.5 * run.scale.lattice.sigma, rel=0.1)
        for t, plus in enumerate(one):
            for s, minus in enumerate(other):
                if s != t:
                    assert float((plus - minus).std()) == pytest.approx(2**0.5 * run.scale.lattice.sigma, rel=0.1)

    @pytest.mark.parametrize("labels", ["true", "opposite"])
    def test_looks_like_a_pad_alone_whatever_the_labels(self, runs, labels):
        """Norms, and the projection on the true update, which the best attacker would look at: to five deviations."""
        run = runs[labels]
        for operator in run.seen:
            for padded, truth in zip(operator.padded, run.deltas, strict=True):
                freedom = len(padded)
                chi = float(padded.square().sum()) / run.scale.lattice.sigma**2
                assert abs(chi - freedom) < 5 * (2 * freedom) ** 0.5
                if float(truth.norm()):
                    along = float(padded @ truth.double()) / float(truth.norm()) / run.scale.lattice.sigma  # N(tiny, 1)
                    assert abs(along) < 5
            for (before, after), (start, end) in zip(pairwise(operator.padded), pairwise(run.deltas), strict=True):
                step, change = (end - start).double(), after - before
                cosine = float(step @ change / step.norm() / change.norm())
                assert abs(cosine) < 5 / freedom**0.5
        assert float(run.deltas[-1].norm()) > 0.1, "something was learned"

    def test_tells_the_update_where_the_pad_is_too_small(self, runs):
        """The same attacks without the defence: what an operator sees moves as the secret moves."""
        run = runs["bare"]
        for sign, operator in zip((1, -1), run.seen, strict=True):
            for (before, after), (start, end) in zip(pairwise(operator.padded), pairwise(run.deltas), strict=True):
                step, change = (end - start).double(), after - before
                assert sign * float(step @ change / step.norm() / change.norm()) > 0.2
            last = operator.padded[-1]
            along = float(last @ run.deltas[-1].double()) / float(run.deltas[-1].norm()) / run.scale.lattice.sigma
            assert sign * along > 100

    def test_runs_with_opposite_labels_learn_opposite_things_and_look_alike(self, runs):
        ends = [runs[name].deltas[-1] for name in ("true", "opposite")]
        assert float(torch.nn.functional.cosine_similarity(*ends, dim=0)) < -0.3
        for position in (0, 1):
            left, right = (runs[name].seen[position].padded[-1] for name in ("true", "opposite"))
            assert abs(float(torch.nn.functional.cosine_similarity(left, right, dim=0))) < 5 / len(left) ** 0.5


@dataclass
class Tap:
    """What the client sends over one connection, beside what it asks at the start."""

    uploads: list[bytes] = field(default_factory=list)
    posts: list[bytes] = field(default_factory=list)


@contextmanager
def tapped(backbone: Backbone):
    taps: list[Tap] = []
    with pytest.MonkeyPatch.context() as patch:
        for operator in backbone.pool.operators:
            tap, transport = Tap(), operator.transport
            patch.setattr(transport, "put", _listening(transport.put, tap.uploads))
            patch.setattr(transport, "post", _listening(transport.post, tap.posts))
            taps.append(tap)
        yield taps


def _listening(send: Callable[..., Any], heard: list[bytes]) -> Callable[..., Any]:
    def listen(path: str, body: bytes) -> Any:
        heard.append(body)
        return send(path, body)

    return listen


def padded_weights(backbone: Backbone, texts: Sequence[str]) -> list[Tensor]:
    """The padded adapter that each operator is sent for these texts, in the order of the operators."""
    found: list[Tensor] = []
    with tapped(backbone) as taps:
        for operator in backbone.pool.operators:
            operator._uploaded.clear()
        with torch.no_grad():
            backbone(texts)
    for tap in taps:
        weights = [decode(body, AdapterUpload)[1]["weights"].double() for body in tap.uploads]
        found += [w for w in weights if torch.count_nonzero(w)]
    return found


class TestHiddenStates:
    def in_process(self, backbone: Backbone, texts: Sequence[str], loaded: FrozenBackbone):
        layout = LoraLayout(backbone.lora_adapters()[0].layout.spec, loaded.lora.shapes)
        tokens = tokens_of(backbone, texts)

        def hidden(weights: Tensor) -> Tensor:
            return loaded.forward(tokens, backbone.readout, layout, weights.unsqueeze(0))[0]

        return hidden

    @pytest.mark.parametrize("length", [1.0, 3.0])
    def test_are_the_frozen_models_and_a_jacobian_vector_product(self, connect, film_sentences, tiny_backbone, length):
        """In float64, by central differences, at the pad (which the two operators' adapters give away together)."""
        backbone = connect(adapter=LAYERS)
        start(backbone, PaddedLoRA(steps=50, **LOOSE))
        direction = move(backbone, length).double()
        texts = film_sentences[:16]
        plus, minus = padded_weights(backbone, texts)
        pad = (plus + minus) / 2
        with torch.no_grad():
            found = backbone(texts).double()
            hidden = self.in_process(backbone, texts, tiny_backbone("bert", "float64"))
            base = hidden(torch.zeros_like(pad))
            small = 1e-4 / length
            product = (hidden(pad + small * direction) - hidden(pad - small * direction)) / (2 * small)
        assert error(found - base, product) < 1e-2
        assert float(product.norm()) > 0.05 * float(base.norm())

    def test_come_near_the_tangent_at_the_pretrained_model_as_pads_shrink(self, connect, film_sentences, tiny_backbone):
        """On average over pads: how curved the model is differs from one to another."""
        loaded, texts, errors = tiny_backbone("bert", "float64"), film_sentences[:16], []
        for spread in (0.64, 0.16, 0.04):
            apart: list[float] = []
            for key in (b"1", b"2", b"3", b"4"):
                backbone = connect(adapter=LAYERS)
                start(backbone, PaddedLoRA(steps=10, max_mu=7.0, pad_spread=spread), key=key * 32)
                direction = move(backbone, 1.0).double()
                with torch.no_grad():
                    found = backbone(texts).double()
                    hidden = self.in_process(backbone, texts, loaded)
                    tangent = (hidden(1e-4 * direction) - hidden(-1e-4 * direction)) / 2e-4
                    apart.append(error(found - hidden(torch.zeros_like(direction)), tangent))
            errors.append(sum(apart) / len(apart))
        assert errors[0] > 1.5 * errors[1] > 2 * errors[2]
        assert errors[1] < 0.4
        assert errors[2] < 0.1

    def test_of_next_to_no_update_are_the_frozen_models_but_for_rounding_that_s_amplifies(
        self, connect, film_sentences
    ):
        """Of a run of 1000 steps with μ = 0.25; float32 has 24 bits."""
        backbone = connect(adapter=LAYERS)
        model = start(backbone, PaddedLoRA(steps=1000))
        move(backbone, 1e-6)
        texts = film_sentences[:16]
        frozen = backbone.frozen(texts)
        with torch.no_grad():
            noise = backbone(texts) - frozen
        amplification = model.method.channel.scale(backbone.batch(backbone.rows(texts), (0, 1), None)).amplification
        assert 100_000 < amplification < 150_000
        assert 0 < float(noise.norm() / frozen.norm()) < amplification * 2**-21

    def test_of_a_longer_update_are_those_of_one_that_is_scaled_down(self, connect, film_sentences):
        backbone = connect(adapter=LAYERS)
        start(backbone, PaddedLoRA(max_norm=SCALING * 0.5, pad_spread=0.008, **LOOSE))
        found: list[Tensor] = []
        for length in (0.5, 2.0):
            move(backbone, length)
            with torch.no_grad():
                found.append(backbone(film_sentences[:8]) - backbone.frozen(film_sentences[:8]))
        assert error(found[1], found[0]) < 0.05

    def test_under_dropout_have_the_same_mask_at_both_operators(self, connect, film_sentences):
        """Or s would amplify what masks do, here 86 times. (A seed switches the model's own dropout on, too.)"""
        config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.3, target_modules="all-linear")
        backbone = connect(adapter=config)
        start(backbone, PaddedLoRA(**SMALL_PADS))
        texts = film_sentences[:8]
        seeds = (None, 7, 8)
        with torch.no_grad():
            base = [backbone.all_adapters(texts, seed=seed) for seed in seeds]
            move(backbone, 1.0)
            moved = [backbone.all_adapters(texts, seed=seed) for seed in seeds]
        plain, seeded, other = (after - before for after, before in zip(moved, base, strict=True))
        assert torch.equal(backbone.all_adapters(texts, seed=7).detach(), moved[1])
        assert 0.1 < error(seeded, plain) < 1.2
        assert 0.1 < error(seeded, other) < 1.5

    def test_do_not_depend_on_who_asks_or_how(self, connect, film_sentences):
        """With gradient, without, and in `infer`: the same adapters, the same answer."""
        backbone = connect(adapter=LAYERS)
        start(backbone, PaddedLoRA())
        move(backbone, 1.0)
        texts = film_sentences[:6]
        differentiable = backbone.all_adapters(texts)
        with torch.no_grad():
            assert torch.equal(backbone.all_adapters(texts), differentiable)
        assert error(backbone.infer(texts), differentiable) < 1e-2


class TestGradients:
    @pytest.mark.parametrize("max_norm", [16.0, 0.5])
    def test_that_arrive_in_b_are_those_of_the_tangent(self, connect, film_sentences, tiny_backbone, max_norm):
        """J₀ᵀ g, times the factor by which a longer update was scaled down."""
        backbone = connect(adapter=LAYERS)
        start(backbone, PaddedLoRA(max_norm=max_norm, clip_norm=100.0, **LOOSE))
        secret = move(backbone, 1.0)
        texts = film_sentences[:8]
        hidden = backbone(texts)
        cotangent = 0.1 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
        hidden.backward(cotangent)
        adapter = backbone.lora_adapters()[0]
        assert all(a.grad is None for a, _ in adapter.named_matrices().values())
        gradients = {name: (a, b.grad) for name, (a, b) in adapter.named_matrices().items()}
        found = adapter.layout.join(gradients)

        loaded = tiny_backbone("bert", "float64")
        leaf = torch.zeros(1, len(secret), dtype=torch.float64, requires_grad=True)
        layout = LoraLayout(adapter.layout.spec, loaded.lora.shapes)
        in_process = loaded.forward(tokens_of(backbone, texts), backbone.readout, layout, leaf)
        (expected,) = torch.autograd.grad(in_process, leaf, cotangent.double().unsqueeze(0))
        factor = min(1.0, max_norm / SCALING / float(secret.norm()))
        assert factor == pytest.approx(1.0 if max_norm == 16.0 else 0.25, rel=1e-5)
        assert error(found, factor * expected[0]) < 5e-3


def learn(model: PrivateModel, texts: Sequence[str], labels: Sequence[int], steps: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(texts, labels).loss.backward()
        optimizer.step()


def some(film_examples: Examples, count: int) -> tuple[list[str], list[int]]:
    return [str(text) for text in film_examples.texts[:count]], film_examples.labels[:count]


class TestMessages:
    """What is sent, and how often, is a matter of counting steps: nothing is left out because it equals another."""

    def test_evaluations_and_the_next_step_are_one(self, connect, film_examples):
        texts, labels = some(film_examples, 8)
        backbone = connect(adapter=LAYERS)
        model = start(backbone, PaddedLoRA(steps=10, check_every=0))
        with tapped(backbone) as taps:
            for _ in range(3):
                predict(model, texts)
                with torch.no_grad():
                    model(texts)
                learn(model, texts, labels)
                model.eval()
                predict(model, texts[:3])
        for tap in taps:
            assert len(tap.uploads) == len(set(tap.uploads)) == 4 + 1  # δ_0 … δ_3, and the public zero once
        assert model.method.ledger.messages("adapter") == 4

    def test_an_update_that_did_not_change_is_sent_anew_and_counts(self, connect, film_examples):
        """Whether it changed depends on labels: a gradient may be zero."""
        texts, labels = some(film_examples, 8)
        backbone = connect(adapter=LAYERS)
        model = start(backbone, PaddedLoRA(steps=10, check_every=0))
        move(backbone, 1.0)
        with tapped(backbone) as taps:
            for _ in range(3):
                (0.0 * model(texts, labels).loss).backward()
        assert model.method.ledger.messages("adapter") == model.method.ledger.messages("share") == 3
        for tap in taps:
            padded = [decode(body, AdapterUpload)[1]["weights"].double() for body in tap.uploads]
            padded = [weights for weights in padded if torch.count_nonzero(weights)]
            assert len(padded) == 3
            sigma = model.method.channel.scale(backbone.batch(backbone.rows(["x"]), (0, 1), None)).lattice.sigma
            for one, other in combinations(padded, 2):
                assert float((one - other).std()) == pytest.approx(2**0.5 * sigma, rel=0.1)
            assert len({body for body in tap.posts if b"cotangents" in body or b"noise" in body}) == 3

    def test_operators_in_another_order_get_other_pads_which_are_counted(self, operators, film_sentences):
        """Or the first would have both halves of one pad."""
        halves: dict[str, list[Tensor]] = {url: [] for url in operators.urls}
        for urls in (operators.urls, operators.urls[::-1]):
            backbone = Backbone(urls, adapter=LAYERS, max_length=32)
            model = start(backbone, PaddedLoRA(steps=20))
            move(backbone, 1.0)
            for url, weights in zip(urls, padded_weights(backbone, film_sentences[:4]), strict=True):
                halves[url].append(weights)
            scale = model.method.channel.scale(backbone.batch(backbone.rows(["x"]), (0, 1), None))
            backbone.close()
        first, second = halves.values()
        together = [(first[0] + second[0]) / 2, (second[1] + first[1]) / 2]
        for pad in together:
            assert float(pad.std()) == pytest.approx(scale.lattice.sigma, rel=0.1)

    def test_a_step_that_is_repeated_after_a_failure_sends_fresh_shares_which_count(self, connect, film_examples):
        """Equal bytes after other answers would tell whether the gradient is the same: an operator that fails a call,
        and then answers otherwise, could ask about a label with that."""
        backbone = connect(adapter=LAYERS)
        model = start(backbone, PaddedLoRA(steps=10, check_every=0))
        trainer = Trainer(model, film_examples.take(range(24)), TrainConfig(steps=4, batch_size=8))
        steps = trainer.steps()
        next(steps)
        second = backbone.pool.operators[1]
        with tapped(backbone) as failed, pytest.MonkeyPatch.context() as patch:
            patch.setattr(second, "backward", _pulled)
            with pytest.raises(ConnectionError):
                next(steps)
        spent = model.method.ledger.allowance()
        with tapped(backbone) as repeated:
            next(trainer.steps())
        assert model.method.ledger.allowance() > spent
        assert model.method.ledger.messages("adapter") == model.method.ledger.messages("share") == 3
        assert [len(tap.posts) for tap in failed] == [3, 2]
        assert [len(tap.posts) for tap in repeated] == [3, 3]
        for before, after in zip(failed, repeated, strict=True):
            assert len(before.uploads) == len(after.uploads) == 1
            assert before.uploads != after.uploads

    def test_a_step_whose_first_call_failed_sends_the_same_adapter_again(self, connect, film_examples):
        """Nothing was trained in between, whatever the labels are."""
        backbone = connect(adapter=LAYERS)
        model = start(backbone, PaddedLoRA(steps=10, check_every=0))
        trainer = Trainer(model, film_examples.take(range(24)), TrainConfig(steps=4, batch_size=8))
        steps = trainer.steps()
        next(steps)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backbone.pool.operators[1], "forward", _pulled)
            with pytest.raises(ConnectionError):
                next(steps)
        with tapped(backbone) as repeated:
            next(trainer.steps())
        assert repeated[0].uploads == []
        assert model.method.ledger.messages("adapter") == 2

    def test_a_resumed_run_goes_on_with_its_ledger(self, connect, film_examples, tmp_path):
        examples = film_examples.take(range(24))
        config = TrainConfig(steps=6, batch_size=8)
        model = start(connect(adapter=LAYERS), PaddedLoRA(steps=6, check_every=0))
        trainer = Trainer(model, examples, config, checkpoint=tmp_path, save_every=3)
        for _, step in zip(range(3), trainer.steps(), strict=False):
            report = step.report
        trainer.save()
        before = model.method.ledger.allowance()
        again = PrivateModel.from_pretrained(tmp_path, connect(adapter=adapter_config(tmp_path)))
        resumed = Trainer(again, examples, config, checkpoint=tmp_path)
        resumed.resume()
        ledger = again.method.ledger
        assert again.method.report() == report
        assert (ledger.allowance(), ledger.messages("adapter"), ledger.run) == (before, 3, model.method.ledger.run)
        steps = resumed.steps()
        next(steps)
        assert (ledger.messages("adapter"), ledger.messages("share")) == (4, 4)
        evaluate(again, examples)
        next(steps)
        assert ledger.messages("adapter") == 5, "the evaluation and the step after it are one message"
        plan, rows = again.method.plan, 32 / again.method.backprop.noise_ratio**2
        assert before == pytest.approx(3 * plan.allowance + 3 * 8 / 32 * rows)

    def test_each_process_that_predicts_sends_a_message_of_its_own(self, connect, film_examples, tmp_path):
        """The same bytes as in training, or in another process, would tell which adapter it is."""
        texts, labels = some(film_examples, 16)
        trained = connect(adapter=LAYERS)
        model = start(trained, PaddedLoRA(steps=2, predictions=2))
        learn(model, texts, labels, steps=2)
        with tapped(trained) as taps:
            chances = predict(model, texts)
        sent = [body for tap in taps for body in tap.uploads]
        model.save_pretrained(tmp_path)
        messages = model.method.ledger.messages("adapter")
        for time_ in range(2):
            backbone = connect(adapter=adapter_config(tmp_path))
            again = PrivateModel.from_pretrained(tmp_path, backbone, predict_only=True)
            with tapped(backbone) as taps:
                found = predict(again, texts)
            uploads = [body for tap in taps for body in tap.uploads]
            assert len(uploads) == 3, "a half each, and the public zero at one"
            both = set(uploads) & set(sent)
            assert not any(decode(body, AdapterUpload)[1]["weights"].any() for body in both), "only the public zero"
            sent += uploads
            assert float((found - chances).abs().max()) < 0.2
            assert again.method.ledger.messages("adapter") == messages + 1 + time_
        assert evaluate(again, Examples(texts, labels, ["0", "1"])) == scores(found, torch.tensor(labels))
        assert again.method.ledger.messages("adapter") == messages + 2, "one for as long as the process runs"

    def test_predictions_over_other_operators_are_in_the_ledger_and_a_resumed_run_knows_of_them(
        self, connect, operators, film_examples, tmp_path
    ):
        """Or the budget would begin anew with each `blindtune predict`."""
        examples = film_examples.take(range(16))
        config = TrainConfig(steps=8, batch_size=8)
        trainer = Trainer(start(connect(adapter=LAYERS), PaddedLoRA(steps=8)), examples, config, checkpoint=tmp_path)
        next(trainer.steps())
        trainer.save()
        backbone = Backbone(operators.urls[::-1], adapter=adapter_config(tmp_path), max_length=32)
        again = PrivateModel.from_pretrained(tmp_path, backbone, predict_only=True)
        predict(again, examples.texts)
        assert again.method.ledger.messages("adapter") == 2
        backbone.close()
        model = PrivateModel.from_pretrained(tmp_path, connect(adapter=adapter_config(tmp_path)))
        resumed = Trainer(model, examples, config, checkpoint=tmp_path)
        resumed.resume()
        assert model.method.ledger.messages("adapter") == 2
        next(resumed.steps())
        assert model.method.ledger.messages("adapter") == 3


def _pulled(*_: Any, **__: Any) -> Any:
    raise ConnectionError("the cable was pulled")


class TestBudget:
    def test_ends_before_anything_of_one_adapter_too_many_is_sent(self, connect, film_examples):
        texts, labels = some(film_examples, 8)
        backbone = connect(adapter=LAYERS)
        model = start(backbone, PaddedLoRA(steps=2, batch_size=8, predictions=0))
        learn(model, texts, labels, steps=3)  # 1.1 · 2 steps are planned, so 3; and 5 adapters
        for seed in range(2):
            predict(model, texts)
            move(backbone, 1.0, seed)
        bits = model.method.report()["information_bits"]
        before = backbone.traffic.requests
        for call in (
            lambda: model(texts, labels),
            lambda: predict(model, texts),
            lambda: backbone.infer(texts),
        ):
            with pytest.raises(BudgetSpent, match=r"planned for 2 steps.*steps="):
                call()
        assert backbone.traffic.requests == before
        assert model.method.report()["information_bits"] == bits
        assert model.method.report()["mu"] == pytest.approx(model.method.max_mu)

    def test_is_not_spent_on_a_step_whose_result_could_never_be_used(self, connect, film_examples):
        """A longer run than planned stops while its adapter may still be sent, so that it can predict."""
        texts, labels = some(film_examples, 8)
        backbone = connect(adapter=LAYERS)
        model = start(backbone, PaddedLoRA(steps=2, batch_size=8, predictions=0))
        with pytest.raises(BudgetSpent):
            learn(model, texts, labels, steps=9)
        secret = delta(backbone)
        with tapped(backbone) as taps, pytest.raises(BudgetSpent, match=r"planned for 2 steps.*steps=") as caught:
            learn(model, texts, labels)
        assert "predictions=" in caught.value.remedy
        assert not any(b"cotangents" in post or b"noise" in post for tap in taps for post in tap.posts)
        assert torch.equal(delta(backbone), secret)
        predict(model, texts)
        model(texts)  # also by a user who leaves gradients on
        assert model.method.ledger.messages("adapter") in (4, 5)

    def test_covers_adapters_and_shares_together(self, connect, film_examples):
        texts, labels = some(film_examples, 8)
        method = PaddedLoRA(steps=19, batch_size=8, max_mu=0.5, predictions=0)
        model = start(connect(adapter=LAYERS), method)
        assert method.report()["mu"] == 0.0
        for step in range(1, 20):
            learn(model, texts, labels)
            brought = step * (method.plan.allowance + 8 / method.backprop.noise_ratio**2)
            assert method.report()["mu"] == pytest.approx(mu_of(brought))
        predict(model, texts)
        found = method.report()
        assert 0.9 * 0.5 < found["mu"] <= 0.5
        assert found["information_bits"] == pytest.approx(found["mu"] ** 2 / 8 / math.log(2.0))
        assert 0 < found["budget_used"] <= 1
        assert found["mu_budget"] == 0.5

    def test_is_the_same_for_every_shape_of_adapter(self, connect, film_sentences):
        for config in (LAYERS, LoraConfig(r=2, lora_alpha=1), LoraConfig(r=4, lora_alpha=64, use_rslora=True)):
            backbone = connect(adapter=config)
            model = start(backbone, PaddedLoRA(steps=9, max_mu=2.0, predictions=0))
            predict(model, film_sentences[:2])
            assert model.method.report()["mu"] == pytest.approx(mu_of(allowance(2.0) / 2 / 13))

    @pytest.mark.parametrize("length", [0.01, 1.0, 100.0])
    def test_is_never_exceeded_by_what_is_really_sent(self, connect, film_sentences, length):
        """However long the update is: it is scaled down to what there is room for, and nobody can see that."""
        backbone = connect(adapter=LAYERS)
        model = start(backbone, PaddedLoRA(steps=9, predictions=0))
        spent = []
        for seed in range(9):
            move(backbone, length, seed)
            plus, minus = padded_weights(backbone, film_sentences[:2])
            scale = model.method.channel.scale(backbone.batch(backbone.rows(["x"]), (0, 1), None))
            spent.append(float(((plus - minus) / 2 / scale.lattice.sigma).square().sum()))
            assert sum(spent) <= (seed + 1) * model.method.plan.allowance
        assert model.method.ledger.used() == pytest.approx(sum(spent) / (9 * model.method.plan.allowance))
        assert (model.method.ledger.used() > 0.5) == (length > 10)


class TestOneOperator:
    def test_is_refused_for_training(self, connect):
        with pytest.raises(SingleOperator, match=r"need 2 operators.*allow_single_operator=True"):
            start(connect(count=1), PaddedLoRA())

    @pytest.mark.parametrize("gradient", [True, False])
    def test_is_refused_for_predictions_before_anything_is_sent(self, connect, film_examples, tmp_path, gradient):
        """Also with gradient switched on, as in any loop that forgets to switch it off."""
        texts, labels = some(film_examples, 8)
        model = start(connect(adapter=LAYERS), PaddedLoRA(steps=2, predictions=2))
        learn(model, texts, labels, steps=2)
        model.save_pretrained(tmp_path)
        backbone = connect(count=1, adapter=adapter_config(tmp_path))
        again = PrivateModel.from_pretrained(tmp_path, backbone, predict_only=True)
        before = backbone.traffic.requests
        with torch.set_grad_enabled(gradient):
            for call in (lambda: again(texts), lambda: backbone.infer(texts), lambda: backbone(texts)):
                with pytest.raises(SingleOperator, match=r"padded adapter needs 2 operators.*1 is given") as caught:
                    call()
                assert "--server" in caught.value.remedy
        assert backbone.traffic.requests == before

    def test_works_if_the_caller_gives_up_privacy_and_then_no_number_is_claimed(self, connect, film_examples):
        texts, labels = some(film_examples, 8)
        one, two = connect(count=1, adapter=LAYERS), connect(adapter=LAYERS)
        method = PaddedLoRA(allow_single_operator=True, **SMALL_PADS)
        model, apart = start(one, method), start(two, PaddedLoRA(**SMALL_PADS))
        move(one, 1.0)
        move(two, 1.0)
        for each in (model, apart):
            each(texts, labels).loss.backward()
        assert method.report() == {}
        assert method.ledger.guarantee().mu == math.inf
        with torch.no_grad():
            assert error(one(texts) - one.frozen(texts), two(texts) - two.frozen(texts)) < 0.02
        grads = [torch.cat([p.grad.flatten() for p in b.parameters() if p.grad is not None]) for b in (one, two)]
        assert error(*grads) < 0.02


class TestMoreOperators:
    def participants(self, backbone: Backbone, model: PrivateModel, texts: list[str], labels: list[int], steps: int):
        """Who was asked for gradients in each step, and who was sent a padded adapter."""
        rounds: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for _ in range(steps):
            with tapped(backbone) as taps:
                learn(model, texts, labels)
            shares = tuple(
                i for i, tap in enumerate(taps) if any(b"cotangents" in post or b"noise" in post for post in tap.posts)
            )
            rounds.append((shares, tuple(i for i, tap in enumerate(taps) if tap.posts)))
        return rounds

    def test_take_turns(self, four_servers, film_examples):
        texts, labels = some(film_examples, 8)
        urls = [server.url for server in four_servers]
        for count, expected in ((3, [(0, 1), (0, 2), (1, 2)]), (4, [(0, 1), (2, 3), (0, 1)])):
            backbone = Backbone(urls[:count], adapter=LAYERS, max_length=32)
            model = start(backbone, PaddedLoRA(steps=4))
            assert self.participants(backbone, model, texts, labels, 3) == [(pair, pair) for pair in expected]
            backbone.close()

    def test_give_the_same_answers_and_gradients_as_two(self, four_servers, film_examples):
        texts, labels = some(film_examples, 8)
        urls = [server.url for server in four_servers]
        answers: list[tuple[Tensor, Tensor, Tensor]] = []
        for count in (2, 3, 4):
            backbone = Backbone(urls[:count], adapter=LAYERS, max_length=32)
            model = start(backbone, PaddedLoRA(**SMALL_PADS))
            move(backbone, 1.0)
            shift = backbone(texts).detach() - backbone.frozen(texts)
            model(texts, labels).loss.backward()
            grads = torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None])
            answers.append((shift, grads, backbone.infer(texts)[0] - backbone.frozen(texts)))
            backbone.close()
        for other in answers[1:]:
            for found, expected in zip(other, answers[0], strict=True):
                assert error(found, expected) < 0.03

    def test_evaluate_in_teams(self, four_servers, film_sentences):
        backbone = Backbone([server.url for server in four_servers], adapter=LAYERS, max_length=32)
        model = start(backbone, PaddedLoRA(steps=4))
        move(backbone, 1.0)
        with tapped(backbone) as taps:
            predict(model, film_sentences[:40])
        assert all(tap.uploads and tap.posts for tap in taps)
        ledger = model.method.channel.ledger
        assert ledger.messages("adapter") == 1
        assert ledger.allowance() == model.method.plan.allowance
        backbone.close()

    @pytest.mark.parametrize(("count", "m"), [(4, 2), (3, 3), (4, 3)])
    def test_are_sent_the_same_bytes_by_an_evaluation_and_by_a_step_of_the_same_pair(
        self, four_servers, film_examples, count, m
    ):
        """Also where more operators take part than get an adapter: the pad is the pair's."""
        texts, labels = some(film_examples, 8)
        backbone = Backbone([server.url for server in four_servers][:count], adapter=LAYERS, max_length=32)
        model = start(backbone, PaddedLoRA(steps=4, m=m))
        move(backbone, 1.0)
        with tapped(backbone) as evaluated:
            backbone.infer(texts)
        with tapped(backbone) as trained:
            learn(model, texts, labels)
        assert all(evaluated[i].uploads for i in (0, 1))
        for tap in trained[:2]:
            assert len(tap.uploads) <= 1, "only the public adapter is new"
        assert model.method.channel.ledger.messages("adapter") == 1
        backbone.close()

    def test_who_see_one_update_in_two_pairs_are_charged_for_both(self, four_servers, film_sentences):
        """Of three operators the first meets the second, then the third; their halves have pads of their own."""
        backbone = Backbone([server.url for server in four_servers][:3], adapter=LAYERS, max_length=32)
        model = start(backbone, PaddedLoRA(steps=4))
        move(backbone, 1.0)
        for _ in range(3):
            backbone(film_sentences[:2])
        assert model.method.channel.ledger.messages("adapter") == 2
        backbone.close()


class TestRefusals:
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_are_not_made_of_explosions(self, connect, film_examples, bad):
        """An adapter with NaN is sent as zero, a gradient too: whoever sees a run break off learns something of it."""
        texts, labels = some(film_examples, 4)
        backbone = connect(adapter=LAYERS)
        model = start(backbone, PaddedLoRA(check_every=0))
        learn(model, texts, labels)
        before = backbone.traffic.requests
        learn(model, texts, labels)
        usual = backbone.traffic.requests - before
        with torch.no_grad():
            next(iter(backbone.lora_adapters()[0].named_matrices().values()))[1][0, 0] = bad
        for step in range(1, 3):
            before = backbone.traffic.requests
            with tapped(backbone) as taps:
                (model(texts, labels).loss * bad).backward()
            assert backbone.traffic.requests - before == usual
            assert all(len(tap.uploads) == 1 for tap in taps)
            assert model.method.report()["nonfinite_messages"] == 2 * step
        assert all(bool(p.grad.isfinite().all()) for p in backbone.parameters() if p.grad is not None)

    def test_a_vector_for_each_position_is(self, connect):
        with pytest.raises(ConfigError, match="one vector for each text"):
            start(connect(pooling="none"), PaddedLoRA())

    def test_adapters_without_effect_are(self, connect, film_sentences):
        with pytest.raises(ConfigError, match="lora_alpha"):
            start(connect(adapter=LoraConfig(r=4, lora_alpha=0)), PaddedLoRA())

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"steps": 0}, "steps = 0 is no count"),
            ({"steps": 1.5}, r"steps = 1\.5 is no count"),
            ({"m": "two"}, "m = 'two' is no count"),
            ({"batch_size": 0}, "batch_size = 0 is no count"),
            ({"gradient_part": 1}, "gradient_part = 1 leaves nothing"),
            ({"check_every": -1}, "check_every = -1 is no count"),
            ({"pad_spread": -0.1}, r"pad_spread = -0\.1 can't work"),
            ({"max_norm": "long"}, "max_norm = 'long' can't work"),
            ({"clip_norm": 0}, "clip_norm = 0 can't work"),
            ({"max_mu": "little"}, "max_mu = 'little' can't work"),
            ({"max_mu": 0}, "max_mu = 0 can't work"),
            ({"max_mu": math.inf}, "max_mu = inf can't work"),
            ({"allow_single_operator": "no"}, "allow_single_operator = 'no' is neither true nor false"),
        ],
    )
    def test_options_that_make_no_sense_are_named(self, options, words):
        with pytest.raises(ConfigError, match=words):
            PaddedLoRA(**options)
        with pytest.raises(ConfigError, match=words):
            make_method("padded-lora", options)

    def test_one_share_is_no_share(self, connect):
        with pytest.raises(ConfigError, match="m = 1"):
            start(connect(), PaddedLoRA(m=1))


def test_callers_in_many_threads_do_not_overspend(connect, film_sentences, monkeypatch):
    """Unless they wait for each other, all see the same room in the budget before any of them has taken it."""
    shares = PrivateBackprop(PrivateBackpropOptions(2, 1.0, 100.0, max_mu=1.0), SecureGenerator(KEY))
    backbone = connect(adapter=LAYERS)
    backbone.set_adapters(1, a_seed="00" * 32)
    integrity = IntegrityCheck(SecureGenerator(KEY), shares.ledger, 0)
    plan = PadPlan(0.16, 16.0, allowance(1.0) / 5, allowance(1.0), 4)
    channel = PaddedAdapters(shares, SecureGenerator(KEY), plan, integrity)
    move(backbone, 1.0)
    batch = backbone.batch(backbone.rows(film_sentences[:1]), (0, 1), None)
    others = [replace(batch, weights=batch.weights * (1 + index), version=(index,)) for index in range(8)]

    def slowly(*arguments: Any) -> None:
        Ledger.check(channel.ledger, *arguments)
        time.sleep(0.05)

    def ask(one: Any) -> bool:
        try:
            channel.hidden(one, backbone.pool, retain=False)
        except BudgetSpent:
            return False
        return True

    monkeypatch.setattr(channel.ledger, "check", slowly)
    with ThreadPoolExecutor(8) as threads:
        answered = list(threads.map(ask, others))
    assert sum(answered) == 5
    assert channel.ledger.guarantee().mu == pytest.approx(1.0)
