"""Operators in this process, which experiments use, are the same as real ones; arms by name, curves, audits."""

import json

import numpy as np
import pytest
import torch

from blindtune.audit import read_view
from blindtune.audit.labels.published import worst_adapter
from blindtune.cli.options import make_lora_config
from blindtune.client import Backbone
from blindtune.data.questions import Question, tokenize
from blindtune.labels import LinearHead, LoRA, PaddedLoRA, PrivateModel, make_method
from blindtune.labels.trainer import TrainConfig, Trainer
from blindtune.local import local_operators
from blindtune.models import Cut, CutModel, Tokenizer, load_backbone
from blindtune.models.cut.emulator import make_emulator
from blindtune.models.cut.parts import Part, pack, unpack
from blindtune.privacy.randomness import SecureGenerator
from blindtune.texts import Boundary, CutCausalLM, LocalTrunk, evaluate_questions, make_design
from blindtune.wire import Transcript
from experiments.labels.published import binary_f1, published
from experiments.labels.run import Arm
from experiments.labels.sweep import RATES, SCALES, arms, chosen_rates, selection
from experiments.lower_layers import LowerLayers
from experiments.texts.run import Arm as TextsArm
from experiments.texts.run import around, wire_of
from experiments.texts.scoring import Wire, hits, score_questions

STEPS = 4


def train(backbone, examples):
    """Weights after a few steps of padded LoRA with a fixed key."""
    backbone.adapter_config = make_lora_config(backbone.info, rank=4, alpha=8, targets=None, layers="1-1")
    method = PaddedLoRA(steps=STEPS)
    head = LinearHead(backbone.hidden_size, 2)
    model = PrivateModel(backbone, head, method, generator=SecureGenerator(bytes(32)), seed=1)
    trainer = Trainer(model, examples, TrainConfig(steps=STEPS, batch_size=16, seed=1))
    trainer.prepare()
    for _ in trainer.steps():
        pass
    return backbone.lora_adapters()[0].vector().detach()


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_local_operators_train_what_real_ones_train(name, start_server, tiny_models, film_examples, tmp_path):
    examples = film_examples.take(range(64))
    with start_server(tiny_models[name]) as a, start_server(tiny_models[name]) as b:
        urls = [a.url, b.url]
        remote = Backbone(urls, num_adapters=0, max_length=32)
        expected = train(remote, examples)
        remote.close()
    model = load_backbone(str(tiny_models[name]))
    lower = LowerLayers(model, 1)
    pool = local_operators(model, record=[tmp_path / "a", tmp_path / "b"])
    for operator, url in zip(pool.operators, urls, strict=True):
        operator.transport.url = url  # which pads and shares are bound to
    local = Backbone(pool, num_adapters=0, max_length=32)
    lower.compute(local.rows(examples.texts), local.tokenizer)
    found = train(local, examples)
    pool.close()
    assert len(lower.known) == len(set(local.rows(examples.texts)))
    # Adam makes whole steps of gradients as small as the shares' rounding
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.98
    assert torch.isfinite(found).all()
    kinds = [event.kind for event in Transcript(tmp_path / "a").events]
    assert kinds.count("backward") == STEPS


def test_known_lower_layers_change_nothing(tiny_models, film_sentences, tmp_path):
    model = load_backbone(str(tiny_models["bert"]))
    pool = local_operators(model, record=[tmp_path / "a"])
    tokenizer = pool.operators[0].tokenizer()
    rows = tokenizer.rows(film_sentences[:20], max_length=32)
    before = model.forward(tokenizer.pad(rows), "mean")
    lower = LowerLayers(model, 1)
    lower.compute(rows, tokenizer)
    ran = []
    model.model.embeddings.register_forward_hook(lambda *_: ran.append("embeddings"))
    model.lora.blocks[0].attention.register_forward_hook(lambda *_: ran.append("block 0"))
    after = model.forward(tokenizer.pad(rows), "mean")
    pool.close()
    assert ran == ["embeddings"]
    assert torch.allclose(before, after, atol=1e-5)


def test_an_arm_is_read_from_its_name():
    arm = Arm.parse('p3eft+lr=0.001+epochs=2+mixing_scale=1.0+regularizer="flip"')
    assert (arm.method, arm.lr, arm.epochs, arm.rank) == ("p3eft", 0.001, 2, None)
    assert arm.options == {"mixing_scale": 1.0, "regularizer": "flip"}
    assert Arm.parse("lora") == Arm("lora", "lora", {})
    make_method(arm.method, arm.options)


@pytest.fixture(scope="module")
def cut_model(tiny_causal, film_sentences):
    """A model in three parts, and questions whose prompts and choices have several lengths."""
    backbone = load_backbone(str(tiny_causal["llama"]), cut=Cut(2, 2))
    tokenizer = Tokenizer(backbone.tokenizer, pad_token_id=backbone.pad_token_id, with_types=False)
    asked = []
    for number, sentence in enumerate(film_sentences[:30]):
        words = sentence.split()[:14]
        choices = (f" {words[0]} good", f" {words[-1]}", " the long film", f" {words[0]} bad {words[-1]}")
        asked.append(Question(" ".join(words), choices[: 2 + number % 3], number % 2))
    return backbone.cut_model, tokenize(asked, tokenizer, max_length=32)


class OverTheWire(LocalTrunk):
    """A trunk that is here, reached through codecs."""

    def __init__(self, part: Part, wire: Wire) -> None:
        super().__init__(part)
        self.wire = wire

    def __call__(self, hidden, lengths):
        arrived = unpack(self.wire.up(pack(hidden, lengths)), lengths)
        return unpack(self.wire.down(pack(super().__call__(arrived, lengths), lengths)), lengths)


@pytest.mark.parametrize("options", [{"up": "fp32", "down": "fp32"}, {"up": "int8", "down": "int4"}, {"anonymity": 3}])
def test_all_choices_in_one_pass_score_as_one_by_one(cut_model, options):
    cut, questions = cut_model
    bottom, trunk, top = (cut.parts[name] for name in ("bottom", "trunk", "top"))
    wire = wire_of(make_design("gradfree", options), bottom)
    model = CutCausalLM(bottom, top, Boundary(OverTheWire(trunk, wire), encode=wire.encode))
    *_, (_, expected) = evaluate_questions(model, questions)
    scores = score_questions(cut.causal, cut.cut, questions, wire=wire, tokens=200)
    found = hits(questions, scores)
    assert {name: sum(rows) / len(rows) for name, rows in found.items()} == {
        name: expected[name] for name in ("accuracy", "accuracy_norm")
    }
    learned = sum(len(question.row) - question.start for question in questions)
    loss = -sum(row[question.answer] for row, question in zip(scores, questions, strict=True)) / learned
    assert loss == pytest.approx(expected["loss"], rel=1e-4)


def test_an_emulator_takes_the_trunks_place_and_the_model_stays(cut_model):
    whole, questions = cut_model
    cut = CutModel.of(whole.causal, Cut(1, 1))
    before = score_questions(cut.causal, cut.cut, questions[:4])
    emulator = make_emulator(cut, 1)
    whole = around(cut.causal, emulator, cut.cut)
    model = CutCausalLM(cut.parts["bottom"], cut.parts["top"], Boundary(LocalTrunk(emulator)))
    *_, (_, expected) = evaluate_questions(model, questions[:4])
    scores = score_questions(whole, cut.cut, questions[:4])
    learned = sum(len(question.row) - question.start for question in questions[:4])
    loss = -sum(row[q.answer] for row, q in zip(scores, questions[:4], strict=True)) / learned
    assert loss == pytest.approx(expected["loss"], rel=1e-4)
    assert scores != before
    assert score_questions(cut.causal, cut.cut, questions[:4]) == before


def test_an_arm_of_private_texts_is_read_from_its_name():
    arm = TextsArm.parse("gradfree+start=60+start_weight=8.0+up=fp32+bottom=4")
    assert (arm.start, arm.start_weight, arm.options, arm.cut) == (60, 8.0, {"up": "fp32"}, Cut(4, 2))


def test_an_arm_of_a_recipe_trains_as_the_recipe_says_but_for_what_is_given():
    arm = Arm.parse("p3eft+recipe=2023+first=4+head=pooler+max_grad_norm=0.5")
    assert (arm.options, arm.first, arm.head) == ({"recipe": 2023}, 4, "pooler")
    method = make_method(arm.method, arm.options)
    completed = method.complete_training(arm.training)
    assert (completed["max_grad_norm"], completed["weight_decay"]) == (0.5, 0.01)


def test_every_arm_of_the_sweep_is_a_method_of_its_own():
    names = [*selection(2.0), *arms(dict.fromkeys(SCALES, 5e-4), 2.0)]
    assert len(set(names)) == len(names)
    for arm in map(Arm.parse, names):
        make_method(arm.method, arm.options)
        assert not arm.training
        assert (arm.first, arm.epochs) == (4, 2.0)


def test_the_sweep_chooses_the_rate_of_each_scale_by_validation_and_asks_for_no_run_without_a_choice(tmp_path):
    best = dict(zip(SCALES, RATES, strict=True))
    for name in selection(2.0):
        arm = Arm.parse(name)
        hit = best[arm.options["mixing_scale"]] == arm.lr
        run = {"validation": {"accuracy": 0.8 if hit else 0.7, "loss": 0.5}}
        (tmp_path / f"{name}-seed1.json").write_text(json.dumps(run))
    assert chosen_rates(tmp_path, 2.0, RATES) == best
    assert selection(2.0, [1e-3]) == []
    assert chosen_rates(tmp_path / "nowhere", 2.0, [1e-3]) == dict.fromkeys(SCALES, 1e-3)


def test_the_papers_measure_sees_a_planted_label_in_the_newest_adapters(tiny_models, film_examples, tmp_path):
    """Adapters that were trained on labels in the clear, on texts that the run trained on and on others."""
    backbone = load_backbone(str(tiny_models["bert"]))
    pool = local_operators(backbone, record=[tmp_path / "a"])
    client = Backbone(pool, num_adapters=0, max_length=32)
    client.adapter_config = make_lora_config(client.info, rank=4, alpha=8, targets=None, layers="0-1")
    trained, others = film_examples.take(range(96)), film_examples.take(range(96, 192))
    model = PrivateModel(client, LinearHead(client.hidden_size, 2), LoRA(), seed=1)
    trainer = Trainer(model, trained, TrainConfig(steps=60, batch_size=32, learning_rate=1e-2, seed=1))
    trainer.prepare()
    for _ in trainer.steps():
        pass
    with torch.no_grad():
        hidden = client.all_adapters(trained.texts)
    pool.close()
    view = read_view(Transcript(tmp_path / "a"), "A")
    found = published(backbone, view, {"training": trained, "validation": others}, 1000, 32)
    assert found["training"]["texts"] == found["validation"]["texts"] == 96
    expected = worst_adapter(hidden.numpy(), np.array(trained.labels))
    assert found["training"]["activations"]["spectral"] == pytest.approx(expected["spectral"], abs=1e-3)
    assert found["training"]["activations"]["spectral"] > found["training"]["frozen"]["spectral"] + 0.1
    assert "differences" not in found["training"], "there is one adapter"


def test_f1_is_that_of_the_second_class():
    predicted, labels = torch.tensor([1, 1, 0, 0, 1]), torch.tensor([1, 0, 1, 0, 1])
    assert binary_f1(predicted, labels) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert binary_f1(torch.zeros(3), torch.zeros(3)) == 0.0
