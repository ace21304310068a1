"""The distance correlation defence over real operators: activations tell less, gradients tell all."""

import pytest
import torch

from blindtune.errors import ConfigError
from blindtune.labels import DistanceCorrelation, LinearHead, PrivateModel, make_method
from blindtune.labels.checkpoint import adapter_config
from blindtune.privacy.distance_correlation import squared_distance_correlation


def start(backbone, film_examples, method, count=32):
    texts, labels = [str(text) for text in film_examples.texts[:count]], film_examples.labels[:count]
    torch.manual_seed(0)
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), method)
    model.prepare(texts, labels)
    return model, texts, torch.tensor(labels)


def steps(model, texts, labels, count, lr=1e-2):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(count):
        optimizer.zero_grad()
        output = model(texts, labels)
        output.loss.backward()
        optimizer.step()
    return output


@pytest.mark.parametrize("channel", ["activations", "shifts"])
def test_training_with_it_leaves_less_of_the_labels_in_its_channel(connect, film_examples, channel):
    """Without it (weight 0) training spaces texts as their labels."""
    found = {}
    for weight in (0.0, 2.0):
        weights = {f"{channel[:-1]}_weight": weight}
        method = DistanceCorrelation(**{"activation_weight": 0.0, **weights})
        model, texts, labels = start(connect(), film_examples, method)
        steps(model, texts, labels, 25)
        with torch.no_grad():
            seen = model.backbone.all_adapters(texts)[0]
            seen = seen - model.backbone.frozen(texts) if channel == "shifts" else seen
        found[weight] = squared_distance_correlation(seen, torch.nn.functional.one_hot(labels).float()).item()
    assert found[0.0] > 0.3
    assert found[2.0] < found[0.0] / 2


def test_channels_are_penalised_by_their_weights(connect, film_examples):
    method = DistanceCorrelation(activation_weight=0.5, shift_weight=0.25)
    model, texts, labels = start(connect(), film_examples, method)
    first = model(texts, labels)
    assert set(first.parts) == {
        "task",
        "distance_correlation",
    }  # adapters haven't moved: a shift of zero has no direction to be pushed in
    steps(model, texts, labels, 4)
    output = model(texts, labels)
    assert set(output.parts) == {"task", "distance_correlation", "distance_correlation_shift"}
    assert output.loss.item() == pytest.approx(sum(output.parts.values()), rel=1e-4)
    model.eval()
    assert set(model(texts, labels).parts) == {"task"}


@pytest.mark.parametrize("count", [1, 3, 4])
def test_the_short_batch_at_the_end_of_an_epoch_can_be_trained_on(connect, film_examples, count):
    model, texts, labels = start(connect(), film_examples, DistanceCorrelation())
    output = steps(model, texts[:count], labels[:count], 1)
    assert ("distance_correlation" in output.parts) == (count >= 4)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_one_class_in_a_batch_and_equal_texts_have_finite_gradients(connect, film_examples):
    model, texts, _ = start(connect(), film_examples, DistanceCorrelation(shift_weight=1.0))
    steps(model, [texts[0]] * 4 + texts[:4], torch.tensor([1] * 8), 3)
    steps(model, [texts[0]] * 4 + texts[:4], torch.tensor([0, 1] * 4), 3)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_loaded_model_predicts_the_same(connect, film_examples, tmp_path):
    model, texts, labels = start(connect(), film_examples, DistanceCorrelation(activation_weight=0.3, shift_weight=0.1))
    steps(model, texts, labels, 2)
    model.eval().save_pretrained(tmp_path)
    again = PrivateModel.from_pretrained(tmp_path, connect(adapter=adapter_config(tmp_path))).eval()
    with torch.no_grad():
        assert torch.equal(model(texts[:9]).logits, again(texts[:9]).logits)
    assert again.method == model.method


@pytest.mark.parametrize("option", ["activation_weight", "shift_weight"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "much", True])
def test_weights_that_weigh_nothing_are_refused(option, value):
    with pytest.raises(ConfigError, match=rf"{option} = .* is no weight.*0 to switch it off"):
        make_method("distance-correlation", {option: value})


def test_the_estimator_is_an_option_and_no_other_is_known(connect, film_examples):
    losses = {}
    for estimator in ("unbiased", "biased"):
        method = make_method("distance-correlation", {"estimator": estimator, "activation_weight": 1.0})
        model, texts, labels = start(connect(), film_examples, method)
        losses[estimator] = model(texts, labels).parts["distance_correlation"]
    assert losses["unbiased"] < losses["biased"] < 0
    with pytest.raises(ConfigError, match=r"no estimator 'plain'.*unbiased, biased"):
        make_method("distance-correlation", {"estimator": "plain"})
