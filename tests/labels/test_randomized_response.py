"""Randomised labels over real operators: what leaves the client is a function of texts and randomised labels alone."""

import pytest
import torch

from blindtune.errors import ConfigError
from blindtune.labels import (
    PSLF,
    LinearHead,
    LoRA,
    PrivateModel,
    RandomizedResponse,
    make_method,
)
from blindtune.labels.checkpoint import adapter_config
from blindtune.privacy.randomized_response import keep_probability
from blindtune.privacy.randomness import SecureGenerator

RANDOMIZED = [RandomizedResponse, PSLF]


def tapped(channel):
    """What an operator hears that listens to a channel's gradients."""
    heard, gradients = [], channel.gradients

    def listen(cotangent, batch, pool):
        heard.append(cotangent.clone())
        return gradients(cotangent, batch, pool)

    channel.gradients = listen
    return heard


def train(backbone, texts, labels, method, *, drawn=None, steps=3, batch=None):
    """A plain loop. `drawn`: randomised labels of an earlier run. Returns the model and what operators were sent."""
    torch.manual_seed(0)
    head = LinearHead(backbone.hidden_size, 2)
    model = PrivateModel(backbone, head, method, generator=SecureGenerator(bytes(32)))
    if drawn is not None:
        method.load_state_dict(drawn)
    heard = tapped(backbone.channel)
    model.prepare(texts, labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(texts[:batch], labels[:batch]).loss.backward()
        optimizer.step()
    return model, torch.stack(heard)


def some(film_examples, count=32):
    return [str(text) for text in film_examples.texts[:count]], film_examples.labels[:count]


def others(labels):
    """Every third label is another. (Were all of them, classes would only change names, and gradients stay.)"""
    return [1 - label if index % 3 == 0 else label for index, label in enumerate(labels)]


def adapter(model) -> torch.Tensor:
    return model.backbone.lora_adapters()[0].vector().detach()


@pytest.mark.parametrize("method", RANDOMIZED)
def test_other_labels_that_were_randomised_alike_send_the_same_bytes(connect, film_examples, method):
    texts, labels = some(film_examples)
    one, sent = train(connect(), texts, labels, method())
    drawn = {name: t for name, t in one.method.state_dict().items() if name.startswith("randomized.")}
    other, sent_by_other = train(connect(), texts, others(labels), method(), drawn=drawn)
    assert torch.equal(sent, sent_by_other)
    assert torch.equal(adapter(one), adapter(other))
    assert float(sent.abs().max()) > 0


def test_without_randomisation_other_labels_send_other_bytes(connect, film_examples):
    texts, labels = some(film_examples)
    one, sent = train(connect(), texts, labels, LoRA())
    other, sent_by_other = train(connect(), texts, others(labels), LoRA())
    assert not torch.allclose(sent, sent_by_other)
    assert not torch.allclose(adapter(one), adapter(other))


def guesses(cotangents: torch.Tensor) -> torch.Tensor:
    """Labels `(B,)` from one step's cotangents `(1, B, d)`: gradients of two classes point in opposite directions."""
    rows = cotangents[0]
    _, _, v = torch.linalg.svd(rows, full_matrices=False)
    return (rows @ v[0] > 0).long()


def agreement(one: torch.Tensor, other: torch.Tensor) -> float:
    same = float((one == other).double().mean())
    return max(same, 1 - same)


@pytest.mark.parametrize("method", RANDOMIZED)
def test_gradients_give_away_the_randomised_labels_and_no_others(connect, film_examples, method):
    """Plain LoRA's tell every true label."""
    texts, labels = some(film_examples, 120)
    true = torch.tensor(labels)
    _, clear = train(connect(), texts, labels, LoRA(), steps=1)
    assert agreement(guesses(clear[0]), true) == 1.0
    model, sent = train(connect(), texts, labels, method(epsilon=1.0), steps=1)
    shown = model.method.adapter_labels(model.backbone.rows(texts), true)
    assert agreement(guesses(sent[0]), shown) == 1.0
    assert agreement(guesses(sent[0]), true) == float((shown == true).double().mean())
    assert float((shown == true).double().mean()) == pytest.approx(keep_probability(1.0, 2), abs=0.13)


@pytest.mark.parametrize("method", RANDOMIZED)
def test_the_loss_while_evaluating_sends_no_true_labels_either(connect, film_examples, method):
    texts, labels = some(film_examples)
    one, _ = train(connect(), texts, labels, method(), steps=1)
    drawn = {name: t for name, t in one.method.state_dict().items() if name.startswith("randomized.")}
    gradients = []
    for given in (labels, others(labels)):
        backbone = connect()
        model = PrivateModel(
            backbone, LinearHead(backbone.hidden_size, 2), method(), generator=SecureGenerator(bytes(32))
        )
        model.method.load_state_dict(drawn)
        torch.manual_seed(1)
        model.head.linear.reset_parameters()
        model.eval()
        model(texts, given).loss.backward()
        gradients.append([p.grad for p in backbone.parameters()])
    for left, right in zip(*gradients, strict=True):
        assert (left is None and right is None) or torch.equal(left, right)


@pytest.mark.parametrize("method", RANDOMIZED)
def test_a_label_is_drawn_once_for_all_steps_batches_and_models_of_a_run(connect, film_examples, tmp_path, method):
    texts, labels = some(film_examples)
    model, _ = train(connect(), texts, labels, method(), batch=8)
    rows, true = model.backbone.rows(texts), torch.tensor(labels)
    drawn = model.method.adapter_labels(rows, true)
    assert not torch.equal(drawn, true)
    assert torch.equal(model.method.adapter_labels(rows[5:9], true[5:9]), drawn[5:9])
    model.save_pretrained(tmp_path)
    again = PrivateModel.from_pretrained(tmp_path, connect(adapter=adapter_config(tmp_path)))
    assert torch.equal(again.method.adapter_labels(rows, 1 - true), drawn)  # kept: true labels don't matter any more


def test_runs_draw_independently(connect, film_examples):
    texts, labels = some(film_examples)
    drawn = []
    for _ in range(2):
        backbone = connect()
        model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), RandomizedResponse())
        drawn.append(model.method.adapter_labels(backbone.rows(texts), torch.tensor(labels)))
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("method", RANDOMIZED)
def test_a_loaded_model_predicts_the_same_and_reports_epsilon(connect, film_examples, tmp_path, method):
    texts, labels = some(film_examples)
    model, _ = train(connect(), texts, labels, method(epsilon=2))
    model.eval()
    model.save_pretrained(tmp_path, classes=["bad", "good"])
    again = PrivateModel.from_pretrained(tmp_path, connect(adapter=adapter_config(tmp_path))).eval()
    with torch.no_grad():
        assert torch.equal(model(texts[:9]).logits, again(texts[:9]).logits)
    assert again.method.report() == {"label_epsilon": 2.0, "label_auc_bound": pytest.approx(0.8808, abs=1e-4)}


@pytest.mark.parametrize("name", ["pslf", "randomized-response"])
@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), "one", True])
def test_an_epsilon_that_randomises_nothing_is_refused(name, value):
    with pytest.raises(ConfigError, match=r"epsilon = .* can't randomise.*positive number such as 1\.0"):
        make_method(name, {"epsilon": value})


def test_a_head_with_one_output_is_refused(connect):
    backbone = connect()
    with pytest.raises(ConfigError, match="one for each class"):
        PrivateModel(backbone, LinearHead(backbone.hidden_size, 1), RandomizedResponse())
