"""The registry: a new method is one class in one file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

from blindtune.errors import ConfigError
from blindtune.labels import (
    METHODS,
    LinearHead,
    PrivateBackpropOptions,
    PrivateModel,
    TrainConfig,
    Trainer,
    adapter_config,
    exposure,
    make_method,
    method,
    method_class,
    predict,
)
from blindtune.labels.methods import AdapterMethod, options_of


@pytest.fixture
def shrinking():
    """A method that also keeps activations small."""

    @method
    @dataclass
    class Shrinking(AdapterMethod):
        """LoRA with small activations."""

        weight: float = 0.1
        name: ClassVar[str] = "shrinking"
        title: ClassVar[str] = "shrinking"
        seen: int = field(init=False, default=0)

        def penalties(self, hidden, frozen, labels):
            self.seen += len(labels)
            return {"size": self.weight * hidden.square().mean()}

    yield Shrinking
    del METHODS["shrinking"]


def test_a_new_method_is_one_class(shrinking, connect, film_examples, tmp_path):
    """It trains, is saved and loaded by its name, and says what operators can learn."""
    assert method_class("shrinking") is shrinking
    made = make_method("shrinking", {"weight": 0.5, "m": 2, "noise_ratio": 50.0})
    assert made == shrinking(PrivateBackpropOptions(m=2, noise_ratio=50.0), weight=0.5)
    backbone, examples = connect(), film_examples.take(range(32))
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), made)
    trainer = Trainer(model, examples, TrainConfig(steps=3, batch_size=8), checkpoint=tmp_path)
    trainer.prepare()
    steps = trainer.run()
    assert [set(step.losses) for step in steps] == [{"task", "size"}] * 3
    assert made.seen == 24
    assert all("one share of each gradient" in line for line in exposure(model, 3))
    again = PrivateModel.from_pretrained(tmp_path, connect(adapter=adapter_config(tmp_path)))
    assert isinstance(again.method, shrinking)
    assert options_of(again.method) == options_of(made)
    assert torch.equal(predict(again, examples.texts), predict(model, examples.texts))


def test_a_method_that_is_not_registered_is_unknown():
    assert "shrinking" not in METHODS
    with pytest.raises(ConfigError, match="no method 'shrinking'"):
        make_method("shrinking")


@pytest.mark.parametrize("name", METHODS)
def test_options_are_flat_and_make_the_same_method_again(name):
    made = make_method(name)
    options = options_of(made)
    assert "backprop" not in options
    assert make_method(name, options) == made
    assert METHODS[name].name == name


def test_an_option_of_a_composed_option_goes_into_it():
    assert make_method("p3eft", {"noise_ratio": 20.0}).backprop == PrivateBackpropOptions(m=2, noise_ratio=20.0)
    assert make_method("pslf", {"m": 3, "epsilon": 2}).backprop.m == 3
