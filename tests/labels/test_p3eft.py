"""P3EFT: secret mixing weights, and the adversary that adapters are trained against."""

import re

import pytest
import torch

from blindtune.errors import ConfigError
from blindtune.labels import (
    HEADS,
    P3EFT,
    LinearHead,
    PrivateBackpropOptions,
    PrivateModel,
    TrainConfig,
    make_head,
    make_method,
)
from blindtune.labels.methods import options_of
from blindtune.labels.methods.p3eft import OWN, RECIPES
from blindtune.privacy.randomness import SecureGenerator


def texts_and_labels(film_examples, count):
    return [str(t) for t in film_examples.texts[:count]], film_examples.labels[:count]


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


def prepared(backbone, method, texts, labels):
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), method, generator=SecureGenerator(bytes(32)))
    model.prepare(texts, labels)
    return model


def test_the_adversary_acts_on_activations_and_shifts(connect, film_examples):
    texts, labels = texts_and_labels(film_examples, 16)
    method = P3EFT(activation_weight=0.5, shift_weight=0.5)
    model = prepared(connect(), method, texts, labels)
    parts = [model(texts, labels).parts for _ in range(2)]
    assert parts[0]["adversary"] > 0
    assert method.state_dict()["adversary.weights"].shape[0] == 4  # two adapters, activations and shifts


def test_the_joint_adversary_acts_on_the_shifts_of_all_adapters_side_by_side(connect, film_examples):
    texts, labels = texts_and_labels(film_examples, 16)
    backbone = connect()
    method = P3EFT(activation_weight=0.0, joint_weight=0.5)
    model = prepared(backbone, method, texts, labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(3):
        output = model(texts, labels)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.parts["joint"] > 0
    assert output.loss.item() == pytest.approx(output.parts["task"] + output.parts["joint"], rel=1e-4)
    state = method.state_dict()
    assert state["joint_adversary.weights"].shape == (1, 2 * backbone.hidden_size + 1, 2)
    with torch.no_grad():
        model(texts, labels)
        shifts = backbone.all_adapters(texts) - backbone.frozen(texts)
    recent = method.state_dict()["joint_adversary.hidden.3"]
    assert torch.allclose(recent[0], torch.cat([shifts[0], shifts[1]], dim=-1), atol=1e-6)


@pytest.mark.parametrize(("option", "found"), [("shift_weight", True), ("joint_weight", False)])
def test_only_the_joint_adversary_finds_a_label_that_two_adapters_hide_together(connect, option, found):
    """One adapter has the label under a pad, the other the pad: each tells little, their difference everything."""
    backbone = connect()
    method = P3EFT(activation_weight=0.0, buffer=3, **{option: 1.0})
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
    method = P3EFT(activation_weight=0.5)
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), method)
    assert not method.needs_frozen
    assert set(model(texts, labels).parts) == {"task", "adversary"}
    assert not any(name.startswith("joint") for name in method.state_dict())


def test_the_adversarys_weight_rises_over_the_first_part_of_a_run_whatever_its_length(connect):
    generator = torch.Generator().manual_seed(0)
    for steps, rise, expected in ((10, 0.4, [0.25, 0.5, 0.75, 1.0, 1.0]), (5, 1.0, [0.2, 0.4, 0.6, 0.8, 1.0])):
        methods = []
        for option in (0.0, rise):
            backbone = connect()
            method = P3EFT(activation_weight=0.5, joint_weight=0.5, steps=steps, rise=option)
            PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), method)
            methods.append(method)
        parts = []
        for _ in range(5):
            hidden = torch.randn(2, 16, backbone.hidden_size, generator=generator)
            labels = torch.randint(2, (16,), generator=generator)
            parts.append([method.penalties(hidden, torch.zeros_like(hidden[0]), labels) for method in methods])
        for name in ("adversary", "joint"):
            assert [float(risen[name] / whole[name]) for whole, risen in parts] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"regularizer": "foo"}, "no regularizer 'foo'"),
        ({"n": "two"}, "n = 'two' is no count"),
        ({"n": 1}, "at least two adapters"),
        ({"m": 1.5}, "m = 1.5 is no count"),
        ({"buffer": 0}, "buffer = 0 is no count"),
        ({"mixing_scale": -1.0}, r"mixing_scale = -1\.0 can't work"),
        ({"clip_norm": "long"}, "clip_norm = 'long' can't work"),
        ({"noise_ratio": 0}, "noise_ratio = 0 can't work"),
        ({"max_mu": "little"}, "max_mu = 'little' is no budget"),
        ({"max_mu": 0}, "max_mu = 0 is no budget"),
        ({"joint_weight": -0.5}, r"joint_weight = -0\.5 is no weight.*0 to switch it off"),
        ({"shift_weight": "much"}, "shift_weight = 'much' is no weight"),
        ({"allow_single_operator": "no"}, "allow_single_operator = 'no' is neither true nor false"),
    ],
)
def test_options_that_make_no_sense_are_named(options, words):
    of_shares = {name: value for name, value in options.items() if name in PrivateBackpropOptions.__annotations__}
    own = {name: value for name, value in options.items() if name not in of_shares}
    with pytest.raises(ConfigError, match=words):
        P3EFT(PrivateBackpropOptions(**{"m": 2, **of_shares}), **own)
    with pytest.raises(ConfigError, match=words):
        make_method("p3eft", options)


def test_a_recipe_sets_the_options_that_are_not_given():
    made = make_method("p3eft", {"recipe": 2023, "n": 3})
    expected = {"centre": False, "mixing_scale": 31.0, "regularizer": "flip", "adversary_fit": "batch"}
    expected |= {"adversary_l2": 1.0, "activation_weight": 0.31, "shift_weight": 0.31, "n": 3, "recipe": 2023}
    assert expected.items() <= options_of(made).items()
    assert made == P3EFT(PrivateBackpropOptions(m=2), n=3, recipe=2023)
    assert make_method("p3eft", options_of(made)) == made, "as a checkpoint restores it"
    later = P3EFT(recipe=2025)
    assert (later.centre, later.mixing_scale, later.shift_weight) == (True, 1.0, 0.0)
    own = P3EFT()
    assert (own.centre, own.regularizer, own.adversary_fit, own.default_head) == (True, "confusion", "buffer", "linear")


def test_every_option_of_a_recipe_is_one_of_the_method():
    for recipe in RECIPES.values():
        assert set(recipe.options) <= set(OWN.options)
        assert recipe.head in HEADS
        TrainConfig(**recipe.training)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"recipe": 2023, "mixing_scale": 5.0},
            r"recipe = 2023 sets mixing_scale = 31\.0, not 5\.0\..*Leave out",
        ),
        ({"recipe": 2023, "regularizer": "confusion"}, "recipe = 2023 sets regularizer = 'flip', not 'confusion'"),
        ({"recipe": 2025, "shift_weight": 0.1}, r"recipe = 2025 sets shift_weight = 0\.0, not 0\.1"),
        ({"recipe": 2023, "buffer": 20}, "recipe = 2023 sets buffer = 1, not 20"),
        ({"recipe": 2024}, r"no recipe 2024\..*Use one of: 2023, 2025"),
        ({"adversary_fit": "epoch"}, "no adversary_fit 'epoch'"),
        ({"centre": "no"}, "centre = 'no' is neither true nor false"),
    ],
)
def test_options_that_contradict_the_recipe_are_named(options, words):
    with pytest.raises(ConfigError) as error:
        make_method("p3eft", options)
    assert re.search(words, str(error.value))


def test_what_a_recipe_sets_may_be_given_again():
    assert P3EFT(recipe=2023, mixing_scale=31) == P3EFT(recipe=2023)
    P3EFT(recipe=2025, activation_weight=1.0)  # the authors varied it


def test_a_recipe_sets_training_too_unless_told_otherwise():
    method = P3EFT(recipe=2023)
    assert method.default_head == "mlp"
    config = TrainConfig(**method.complete_training({}))
    assert config.head_learning_rate == config.learning_rate
    assert (config.max_grad_norm, config.weight_decay) == (1.0, 0.01)
    config = TrainConfig(**method.complete_training({"learning_rate": 0.5, "max_grad_norm": 0.0}))
    assert (config.learning_rate, config.head_learning_rate, config.max_grad_norm) == (0.5, 0.5, 0.0)
    config = TrainConfig(**P3EFT().complete_training({"steps": 3}))
    assert config == TrainConfig(steps=3, learning_rate=P3EFT.default_lr)


def test_a_head_that_could_not_learn_from_zeros_is_refused(connect):
    backbone = connect()
    with pytest.raises(ConfigError, match="mixes into zeros"):
        PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), P3EFT(recipe=2023))
    PrivateModel(backbone, make_head("mlp", backbone.hidden_size, 2), P3EFT(recipe=2023))


def test_the_recipe_of_2023_learns_although_its_adapters_start_as_zeros(connect, film_examples):
    texts, labels = texts_and_labels(film_examples, 32)
    backbone, method = connect(), P3EFT(recipe=2023)
    head = make_head("mlp", backbone.hidden_size, 2, seed=0)
    model = PrivateModel(backbone, head, method, generator=SecureGenerator(bytes(32)))
    model.prepare(texts, labels)
    with torch.no_grad():
        assert method.mix(backbone.all_adapters(texts)).abs().max() < 1e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(25):
        output = model(texts, labels)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.parts["task"])
    assert losses[-1] < losses[0] / 2
    assert method.state_dict()["adversary.weights"].shape[0] == 4


def test_the_manual_states_the_values_without_a_recipe():
    stated = [value for group in re.findall(r"\[([^\]]+)\]", P3EFT.__doc__) for value in group.split(", ")]
    order = ("centre", "mixing_scale", "regularizer", "activation_weight", "shift_weight", "adversary_fit", "buffer")
    values = [OWN.options[name] for name in (*order, "adversary_l2")]
    assert stated == [str(value).lower() if isinstance(value, (bool, str)) else f"{value:g}" for value in values]
