"""`PrivateModel` in a plain torch loop."""

import pytest
import torch

from blindtune.errors import BadLabels, ConfigError
from blindtune.methods import (
    P3EFT,
    PSLF,
    DistanceCorrelation,
    HeadOnly,
    LinearHead,
    LoRA,
    PrivateModel,
    RandomizedResponse,
    make_method,
)
from blindtune.privacy.randomness import SecureGenerator

METHODS = {
    "lora": LoRA,
    "head_only": HeadOnly,
    "p3eft": lambda: P3EFT(decoys=1, task_delay=0, task_rise=0),
    "dc": lambda: DistanceCorrelation(activation_weight=0.01),
    "pslf": PSLF,
    "randomized_response": RandomizedResponse,
}


def texts_and_labels(film_examples, count):
    return [str(t) for t in film_examples.texts[:count]], film_examples.labels[:count]


@pytest.mark.parametrize("name", list(METHODS))
def test_a_plain_loop_lowers_the_loss(connect, film_examples, name):
    texts, labels = texts_and_labels(film_examples, 32)
    backbone = connect()
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), METHODS[name]())
    model.prepare(texts, labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(8):
        output = model(texts, labels)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.parts["task"])
    assert losses[-1] < losses[0] - 0.02


def test_any_head_and_loss(connect, film_examples):
    texts, labels = texts_and_labels(film_examples, 8)
    backbone = connect()
    head = torch.nn.Sequential(torch.nn.Linear(backbone.hidden_size, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    model = PrivateModel(backbone, head, LoRA(), loss=torch.nn.MultiMarginLoss())
    output = model(texts, labels)
    output.loss.backward()
    assert output.logits.shape == (8, 3)
    assert all(p.grad is not None for p in model.parameters())


def test_adapters_start_alike_in_what_they_compute_and_different_in_what_they_are(connect, film_sentences):
    backbone = connect()
    PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), P3EFT(n=3))
    hidden = backbone.all_adapters(film_sentences[:4])
    assert torch.equal(hidden[0], hidden[1])
    assert torch.equal(hidden[0], hidden[2])
    first, second = (adapter.vector() for adapter in backbone.lora_adapters()[:2])
    assert not torch.equal(first, second)


def test_mixing_weights_are_secret_and_fresh(connect):
    weights = []
    for _ in range(2):
        backbone = connect()
        method = P3EFT()
        PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), method)
        weights.append(method.mixing)
    assert not torch.allclose(weights[0], weights[1])


def test_p3eft_asks_for_preparation_where_it_needs_it(connect, film_examples):
    texts, labels = texts_and_labels(film_examples, 8)
    backbone = connect()
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), P3EFT())
    with pytest.raises(ConfigError, match=r"frozen features.*model\.prepare"):
        model(texts, labels)


def test_the_adversary_acts_on_activations_and_shifts(connect, film_examples):
    texts, labels = texts_and_labels(film_examples, 16)
    backbone = connect()
    method = P3EFT(decoys=0, activation_weight=0.5, shift_weight=0.5, task_delay=0)
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), method, generator=SecureGenerator(bytes(32)))
    model.prepare(texts, labels)
    parts = [model(texts, labels).parts for _ in range(2)]
    assert parts[0]["adversary"] > 0
    assert method.state()["adversary.weights"].shape[0] == 4  # two adapters, activations and shifts


def test_the_joint_adversary_acts_on_the_shifts_of_all_adapters_side_by_side(connect, film_examples):
    texts, labels = texts_and_labels(film_examples, 16)
    backbone = connect()
    method = P3EFT(decoys=0, joint_weight=0.5, task_delay=0, task_rise=0)
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), method, generator=SecureGenerator(bytes(32)))
    model.prepare(texts, labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(3):
        output = model(texts, labels)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.parts["joint"] > 0
    assert output.loss.item() == pytest.approx(output.parts["task"] + output.parts["joint"], rel=1e-4)
    state = method.state()
    assert state["joint_adversary.weights"].shape == (1, 2 * backbone.hidden_size + 1, 2)
    with torch.no_grad():
        model(texts, labels)
        shifts = backbone.all_adapters(texts) - backbone.frozen(texts)
    recent = method.state()["joint_adversary.hidden.3"]
    assert torch.allclose(recent[0], torch.cat([shifts[0], shifts[1]], dim=-1), atol=1e-6)


@pytest.mark.parametrize(("option", "found"), [("shift_weight", True), ("joint_weight", False)])
def test_only_the_joint_adversary_finds_a_label_that_two_adapters_hide_together(connect, option, found):
    """One adapter has the label under a pad, the other the pad: each tells little, their difference everything."""
    backbone = connect()
    method = P3EFT(decoys=0, buffer=3, **{option: 1.0})
    PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), method)
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (256,), generator=random)
    shifts = torch.randn(2, 256, backbone.hidden_size, generator=random)
    pad = 8 * torch.randn(256, generator=random)
    shifts[0, :, 0] = pad + 2 * (2.0 * labels - 1)
    shifts[1, :, 0] = pad

    def gap(values: torch.Tensor) -> float:
        difference = values[0, :, 0] - values[1, :, 0]
        return float(difference[labels == 1].mean() - difference[labels == 0].mean())

    frozen = torch.zeros(256, backbone.hidden_size)
    moving = shifts.clone().requires_grad_()
    optimizer = torch.optim.Adam([moving], lr=0.02)
    for _ in range(160):
        optimizer.zero_grad()
        sum(method.penalties(moving, frozen, labels).values()).backward()
        optimizer.step()
    left = abs(gap(moving.detach())) / gap(shifts)
    assert left > 0.6 if found else left < 0.3


def test_without_a_weight_there_is_no_joint_adversary(connect, film_examples):
    texts, labels = texts_and_labels(film_examples, 16)
    backbone = connect()
    method = P3EFT(decoys=0, activation_weight=0.5, task_delay=0)
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), method)
    assert not method.needs_frozen
    assert set(model(texts, labels).parts) == {"task", "adversary"}
    assert not any(name.startswith("joint") for name in method.state())


def test_the_task_waits_for_the_decoys(connect, film_examples):
    texts, labels = texts_and_labels(film_examples, 16)
    backbone = connect()
    method = P3EFT(decoys=1, steps=10, task_delay=0.2, task_rise=0.2)
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), method)
    model.prepare(texts, labels)
    weights = []
    for _ in range(5):
        weights.append(method.task_weight())
        output = model(texts, labels)
        assert output.loss.item() == pytest.approx(
            weights[-1] * output.parts["task"] + output.parts["decoys"] + output.parts.get("anchor", 0.0), rel=1e-4
        )
    assert weights == [0.0, 0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("labels", "words"),
    [([0.5, 1.0], "dtype torch.float32"), ([0, 5], "from 0 to 5; the head has 2"), ([-1, 0], "from -1 to 0")],
)
def test_labels_that_do_not_fit_the_head_are_refused_before_anything_is_sent(connect, film_sentences, labels, words):
    backbone = connect()
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), LoRA())
    before = backbone.traffic.requests
    with pytest.raises(BadLabels, match=words):
        model(film_sentences[:2], labels)
    assert backbone.traffic.requests == before


def test_unknown_methods_and_options_are_named():
    with pytest.raises(ConfigError, match=r"no method 'p4eft'.*lora, head_only, p3eft"):
        make_method("p4eft")
    with pytest.raises(ConfigError, match=r"no option \['adapters'\]"):
        make_method("p3eft", {"adapters": 2})
    with pytest.raises(ConfigError, match="at least two adapters"):
        make_method("p3eft", {"n": 1})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"regularizer": "foo"}, "no regularizer 'foo'"),
        ({"n": "two"}, "n = 'two' is no count"),
        ({"decoys": 1.5}, "decoys = 1.5 is no count"),
        ({"buffer": 0}, "buffer = 0 is no count"),
        ({"mixing_scale": -1.0}, "mixes nothing"),
        ({"joint_weight": -0.5}, r"Weights of the regularizer are \[0.0, 0.0, -0.5, 20.0\].*0 switches a part off"),
        ({"shift_weight": "much"}, "Weights of the regularizer are .*'much'"),
    ],
)
def test_options_that_make_no_sense_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        P3EFT(**options)


def test_a_short_run_still_learns_its_task():
    """Schedules are parts of the run, whatever its length."""
    for steps in (5, 12, 1000):
        method = P3EFT(steps=steps)
        method._step = steps - 1
        assert method.task_weight() == 1.0


def test_many_classes_get_decoys(connect, film_sentences):
    backbone = connect()
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 7), P3EFT())
    labels = [i % 7 for i in range(56)]
    model.prepare(film_sentences[:56], labels)
    assert model(film_sentences[:8], labels[:8]).parts["decoys"] >= 0


def test_save_pretrained_is_what_peft_users_expect(connect, film_examples, tmp_path):
    backbone = connect()
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), LoRA())
    model.save_pretrained(tmp_path / "out", classes=["bad", "good"])
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert (tmp_path / "out" / "blindtune.json").is_file()
