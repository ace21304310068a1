"""`PrivateModel` in a plain torch loop."""

import copy

import pytest
import torch

from blindtune.errors import BadLabels, ConfigError, SingleOperator
from blindtune.labels import (
    P3EFT,
    PSLF,
    DistanceCorrelation,
    Features,
    LinearHead,
    LoRA,
    PaddedLoRA,
    PrivateModel,
    RandomizedResponse,
    make_method,
    predict,
)
from blindtune.privacy.randomness import SecureGenerator
from tests.tiny import HIDDEN

METHODS = {
    "lora": LoRA,
    "features": Features,
    "padded-lora": PaddedLoRA,
    "p3eft": P3EFT,
    "distance-correlation": lambda: DistanceCorrelation(activation_weight=0.01),
    "pslf": PSLF,
    "randomized-response": RandomizedResponse,
}


def texts_and_labels(film_examples, count):
    return [str(t) for t in film_examples.texts[:count]], film_examples.labels[:count]


@pytest.mark.parametrize("name", list(METHODS))
def test_a_plain_loop_lowers_the_loss(connect, film_examples, name):
    texts, labels = texts_and_labels(film_examples, 32)
    backbone = connect()
    generator = SecureGenerator(bytes(range(32)))  # secret mixing weights decide how fast
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), METHODS[name](), generator=generator)
    model.prepare(texts, labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(8):
        output = model(texts, labels)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.parts["task"])
    assert losses[-1] < losses[0] - 0.02, losses


def test_any_head_and_loss(connect, film_examples):
    texts, labels = texts_and_labels(film_examples, 8)
    backbone = connect()
    head = torch.nn.Sequential(torch.nn.Linear(backbone.hidden_size, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    model = PrivateModel(backbone, head, LoRA(), loss=torch.nn.MultiMarginLoss())
    output = model(texts, labels)
    output.loss.backward()
    assert output.logits.shape == (8, 3)
    assert all(p.grad is not None for p in model.parameters())


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
    with pytest.raises(
        ConfigError, match=r"no method 'p4eft'.*distance-correlation, features, lora, p3eft, padded-lora, "
    ):
        make_method("p4eft")
    with pytest.raises(ConfigError, match=r"no option \['adapters'\]"):
        make_method("padded-lora", {"adapters": 2})
    with pytest.raises(ConfigError, match=r"no option \['n'\].*max_mu"):
        make_method("padded-lora", {"n": 2})


def test_save_pretrained_is_what_peft_users_expect(connect, film_examples, tmp_path):
    backbone = connect()
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), LoRA())
    model.save_pretrained(tmp_path / "out", classes=["bad", "good"])
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert (tmp_path / "out" / "blindtune.json").is_file()


def test_a_method_belongs_to_one_model(connect):
    """It counts what operators see: a second model's ledger would take the place of the first one's."""
    method = PaddedLoRA()
    backbone = connect()
    PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), method)
    with pytest.raises(ConfigError, match="belongs to another model"):
        PrivateModel(connect(), LinearHead(backbone.hidden_size, 2), method)


def test_a_backbone_that_another_model_took_is_not_used_any_more(connect, film_examples, tmp_path):
    """What the first model sends would be counted in the second one's ledger."""
    texts, labels = texts_and_labels(film_examples, 4)
    backbone = connect()
    first = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), PaddedLoRA())
    second = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), PaddedLoRA())
    before = backbone.traffic.requests
    uses = [
        lambda: first(texts, labels),
        lambda: first.prepare(texts, labels),
        lambda: predict(first, texts),
        lambda: first.save_pretrained(tmp_path / "out"),
    ]
    for use in uses:
        with pytest.raises(ConfigError, match="belongs to another model now"):
            use()
    assert backbone.traffic.requests == before
    assert not (tmp_path / "out").exists()
    second(texts, labels)


def test_adapters_that_somebody_else_put_in_are_not_sent(connect, film_examples):
    """They may be another model's, which shares the backbone's modules."""
    texts, labels = texts_and_labels(film_examples, 4)
    first = PrivateModel(connect(), LinearHead(HIDDEN, 2), PaddedLoRA())
    PrivateModel(copy.copy(first.backbone), LinearHead(HIDDEN, 2), PaddedLoRA())
    with pytest.raises(ConfigError, match="belongs to another model now"):
        first(texts, labels)


def test_a_model_that_is_refused_takes_nothing(connect, film_examples):
    texts, labels = texts_and_labels(film_examples, 4)
    model = PrivateModel(connect(), LinearHead(HIDDEN, 2), PaddedLoRA())
    with pytest.raises(SingleOperator):
        PrivateModel(model.backbone, LinearHead(HIDDEN, 2), PaddedLoRA(m=3))
    model(texts, labels)
