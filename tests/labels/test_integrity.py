"""Label-free questions to several operators: an operator that answers otherwise than the others is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open

from blindtune.client import Backbone, OperatorPool, Transport
from blindtune.data import Examples
from blindtune.errors import LabelDependentBatches, OperatorsDiffer, OperatorsDisagree
from blindtune.labels import LinearHead, PaddedLoRA, PrivateModel
from blindtune.labels.methods.padded_lora import PrecisionWarning
from blindtune.privacy.ledger import read_journal
from blindtune.privacy.randomness import SecureGenerator

LAYERS = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")


def start(backbone: Backbone, folder=None, **options) -> PrivateModel:
    method = PaddedLoRA(**{"steps": 40, "batch_size": 8} | options)
    head = LinearHead(backbone.hidden_size, 2)
    return PrivateModel(backbone, head, method, generator=SecureGenerator(bytes(range(32))), ledger=folder)


def steps(model: PrivateModel, examples: Examples, count: int) -> int:
    """Trains; the number of steps in which questions were asked."""
    texts, labels = [str(text) for text in examples.texts[:8]], examples.labels[:8]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(count):
        optimizer.zero_grad()
        model(texts, labels).loss.backward()
        optimizer.step()
    return model.method.channel.integrity.asked


def cheat(backbone: Backbone, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The second operator changes its answers, as a server could."""
    operator = backbone.pool.operators[1]
    honest = getattr(operator, name)

    def answer(*arguments, **options):
        found = honest(*arguments, **options)
        return found if found is None else change(found)

    setattr(operator, name, answer)


class TestQuestions:
    def test_are_asked_in_one_of_k_steps_and_honest_operators_agree(self, connect, film_examples):
        model = start(connect(adapter=LAYERS), check_every=4)
        asked = steps(model, film_examples, 24)
        assert 2 <= asked <= 12
        assert model.method.ledger.messages("check") == asked
        assert steps(start(connect(adapter=LAYERS), check_every=0), film_examples, 4) == 0

    def test_cost_nothing_of_the_budget(self, connect, film_examples):
        reports = []
        for every in (0, 2):
            model = start(connect(adapter=LAYERS), check_every=every)
            steps(model, film_examples, 6)
            reports.append(model.method.report()["mu"])
        assert reports[0] == reports[1]

    @pytest.mark.parametrize(
        ("name", "question"),
        [("forward", "hidden states under an adapter of noise"), ("backward", "the gradient of a share of noise")],
    )
    def test_find_an_operator_that_answers_otherwise_and_save_the_evidence(
        self, connect, film_examples, tmp_path, name, question
    ):
        backbone = connect(adapter=LAYERS)
        model = start(backbone, tmp_path, check_every=2)
        cheat(backbone, name, lambda found: found * 1.01)
        with pytest.raises(OperatorsDisagree, match=question) as caught:
            steps(model, film_examples, 12)
        before = backbone.traffic.requests
        assert all(operator.transport.url in str(caught.value) for operator in backbone.pool.operators)
        [evidence] = tmp_path.glob("evidence-*.safetensors")
        assert str(evidence) in caught.value.remedy
        with safe_open(evidence, framework="pt") as file:
            assert file.metadata()["question"] == question
            assert json.loads(file.metadata()["operators"]) == backbone.pool.urls
            first, second = (file.get_tensor(f"answer.{index}") for index in (0, 1))
            assert torch.allclose(second, first * 1.01)
            assert {"adapter", "input_ids", "lengths"} <= set(file.keys())
        assert backbone.traffic.requests == before

    def test_are_not_fooled_by_noise_where_the_difference_is_small(self, connect, film_examples):
        backbone = connect(adapter=LAYERS)
        model = start(backbone, check_every=1)
        cheat(backbone, "forward", lambda found: found + 1e-4 * found.std() * torch.randn_like(found))
        with pytest.raises(OperatorsDisagree, match="where other processors explain 2e-05"):
            steps(model, film_examples, 1)

    def test_are_written_to_the_ledger_before_they_are_asked(self, connect, film_examples, tmp_path):
        model = start(connect(adapter=LAYERS), tmp_path, check_every=1)
        steps(model, film_examples, 3)
        assert read_journal(tmp_path / "ledger.jsonl").messages("check") == 3


class TestTokenizers:
    def test_that_differ_are_refused(self, operators, monkeypatch):
        """An operator that offers another tokenizer would decide what texts mean."""
        original = Transport.get

        def other(self: Transport, path: str):
            answer = original(self, path)
            if path.endswith("/tokenizer") and self.url == operators.urls[1]:
                text = answer["tokenizer"].replace('"film"', '"movie_"') + " "
                answer = {**answer, "tokenizer": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
            return answer

        monkeypatch.setattr(Transport, "get", other)
        with pytest.raises(OperatorsDiffer, match=f"{operators.urls[1]} offers another tokenizer than"):
            Backbone(operators.urls)

    def test_whose_hash_is_wrong_are_refused(self, operators, monkeypatch):
        original = Transport.get
        wrong = {"sha256": "0" * 64}
        monkeypatch.setattr(
            Transport, "get", lambda self, path: original(self, path) | (wrong if path.endswith("/tokenizer") else {})
        )
        pool = OperatorPool.connect([Transport(url) for url in operators.urls], None)
        with pytest.raises(Exception, match="blindtune"):
            pool.tokenizer()


class TestPrecision:
    def texts(self, examples: Examples) -> tuple[list[str], list[int]]:
        return [str(text) for text in examples.texts[:32]], examples.labels[:32]

    def test_is_measured_before_anything_depends_on_labels(self, connect, film_examples):
        """And costs nothing: three pairs of adapters with a random update."""
        model = start(connect(adapter=LAYERS))
        model.prepare(*self.texts(film_examples))
        assert 0 < model.precision["rounding_error"] < 0.1
        assert 0 < model.precision["pad_error"] < 0.5
        assert model.method.report()["mu"] == 0.0
        assert model.method.ledger.messages("check") == 1

    def test_follows_pads_and_amplification(self, connect, film_examples):
        found = {}
        for name, options in {
            "default": {}, "large pads": {"pad_spread": 0.4}, "little budget": {"max_mu": 0.05},
        }.items():  # fmt: skip
            model = start(connect(adapter=LAYERS), **options)
            model.prepare(*self.texts(film_examples))
            found[name] = model.precision
        assert found["large pads"]["pad_error"] > 2 * found["default"]["pad_error"]
        assert found["little budget"]["rounding_error"] > 4 * found["default"]["rounding_error"]

    def test_that_is_lost_to_the_budget_is_said(self, connect, film_examples):
        model = start(connect(adapter=LAYERS), max_mu=1e-4)
        with pytest.warns(PrecisionWarning, match=r"Rounding at the operators makes an error of \d+%.*max_mu"):
            model.prepare(*self.texts(film_examples))


class TestBatches:
    def test_that_depend_on_labels_are_refused_before_they_are_sent(self, connect, film_examples):
        texts, labels = [str(text) for text in film_examples.texts[:200]], [int(i < 20) for i in range(200)]
        backbone = connect(adapter=LAYERS)
        model = start(backbone, check_every=0, steps=80)
        model.prepare(texts, labels)
        sampler = torch.utils.data.WeightedRandomSampler([9.0 if label else 1.0 for label in labels], 80 * 8)
        chosen = list(sampler)
        sent: list[int] = []

        def train() -> None:
            for step in range(80):
                batch = chosen[8 * step : 8 * step + 8]
                sent.append(backbone.traffic.requests)
                model([texts[i] for i in batch], [labels[i] for i in batch])

        with pytest.raises(LabelDependentBatches, match="of the training set and"):
            train()
        assert backbone.traffic.requests == sent[-1]

    def test_may_be_used_to_evaluate(self, connect, film_examples):
        texts, labels = [str(text) for text in film_examples.texts[:40]], [int(i < 4) for i in range(40)]
        model = start(connect(adapter=LAYERS), check_every=0)
        model.prepare(texts, labels)
        for _ in range(30):
            with torch.no_grad():
                model(texts[:4], labels[:4])
