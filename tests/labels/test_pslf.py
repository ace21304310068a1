"""PSLF's two heads: one for the adapters and their randomised labels, one that predicts and learns the true ones."""

import torch

from blindtune.labels import PSLF, LinearHead, PrivateModel
from blindtune.labels.checkpoint import adapter_config
from blindtune.privacy.randomness import SecureGenerator


def start(backbone, film_examples, count=32, epsilon=1.0):
    texts, labels = [str(text) for text in film_examples.texts[:count]], film_examples.labels[:count]
    head = LinearHead(backbone.hidden_size, 2)
    model = PrivateModel(backbone, head, PSLF(epsilon=epsilon), generator=SecureGenerator(bytes(32)))
    model.prepare(texts, labels)
    return model, texts, torch.tensor(labels)


def test_each_head_learns_its_labels(connect, film_examples):
    model, texts, true = start(connect(), film_examples, count=64)
    shown = model.method.adapter_labels(model.backbone.rows(texts), true)
    assert not torch.equal(shown, true)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(texts, true).loss.backward()
        optimizer.step()
    with torch.no_grad():
        features = model.method.mix(model.backbone.all_adapters(texts))
        predicted = model.head(features).argmax(-1)
        of_adapters = model.auxiliary(features).argmax(-1)
    differ = shown != true
    right, wrong = ((labels == true)[differ].double().mean() for labels in (predicted, of_adapters))
    assert right > wrong + 0.3  # the head undoes noise that the adapters have learned


def test_the_loss_is_that_of_both_heads_and_the_predicting_one_sends_no_gradient(connect, film_examples):
    model, texts, true = start(connect(), film_examples)
    output = model(texts, true)
    assert abs(output.loss.item() - output.parts["task"] - output.parts["auxiliary"]) < 1e-5
    torch.nn.functional.cross_entropy(output.logits, true).backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.head.parameters())
    assert all(p.grad is None for p in model.auxiliary.parameters())


def test_any_head_may_predict(connect, film_examples):
    texts, labels = [str(text) for text in film_examples.texts[:8]], film_examples.labels[:8]
    backbone = connect()
    head = torch.nn.Sequential(torch.nn.Linear(backbone.hidden_size, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    model = PrivateModel(backbone, head, PSLF(), loss=torch.nn.MultiMarginLoss())
    model(texts, labels).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_auxiliary_head_is_trained_saved_and_loaded_whole(connect, film_examples, tmp_path):
    model, texts, true = start(connect(), film_examples)
    assert {id(p) for p in model.auxiliary.parameters()} <= {id(p) for p in model.parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: tensor.clone() for name, tensor in model.auxiliary.state_dict().items()}
    state = model.method.state_dict()
    model(texts, true).loss.backward()
    optimizer.step()
    assert not torch.equal(model.auxiliary.linear.weight, before["linear.weight"])
    assert all(
        torch.equal(state[f"auxiliary.{name}"], tensor) for name, tensor in before.items()
    )  # not changed in place
    model.save_pretrained(tmp_path)
    again = PrivateModel.from_pretrained(tmp_path, connect(adapter=adapter_config(tmp_path)))
    for name, tensor in model.auxiliary.state_dict().items():  # mean and scale too
        assert torch.equal(again.auxiliary.state_dict()[name], tensor)
    assert not torch.equal(again.auxiliary.linear.weight, again.head.linear.weight)
