"""Tangent sketch: kernel regression on LoRA's Jacobian along public directions. What is sent ignores labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge

from blindtune.audit import read_view
from blindtune.client import Backbone
from blindtune.errors import ConfigError
from blindtune.labels import (
    LinearHead,
    PrivateModel,
    SketchHead,
    TangentSketch,
    evaluate,
    exposure,
    make_method,
    readout_of,
)
from blindtune.local import local_operators
from blindtune.models import load_backbone
from blindtune.training import LabelsSummary, read_summary
from blindtune.wire import Transcript
from tests.labels.test_features import blobs


def fitted(connect, film_examples, *, count: int = 160, flip: int = 0, **options) -> PrivateModel:
    backbone = connect(1, readout="all", num_adapters=0)
    texts, labels = [str(t) for t in film_examples.texts[:count]], [y ^ flip for y in film_examples.labels[:count]]
    method = TangentSketch(**{"directions": 9, "rank": 2, "size": 8, **options})
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), method)
    model.prepare(texts, labels)
    return model


def record_posts(transport) -> list[tuple[str, bytes]]:
    """The paths and bodies of all later requests."""
    bodies, post = [], transport.post

    def recorded(path: str, body: bytes) -> bytes:
        bodies.append((path, body))
        return post(path, body)

    transport.post = recorded
    return bodies


class TestHead:
    def make(self, **more) -> SketchHead:
        return SketchHead(20, 3, sketch=8, weight=0.7, gamma=0.5, ridge=0.3, parts=[0, 2], of=3, **more)

    def test_agrees_with_scikit_learn(self):
        features, labels = blobs(150, 0, dim=20)
        features[:, 12:] *= 1e-3  # a sketch of another size than the states
        head = self.make()
        head.fit(features, labels)
        read = features[:, [0, 1, 2, 3, 8, 9, 10, 11, *range(12, 20)]]
        x = ((read - read.mean(0)) / read.std(0, correction=0)).numpy()

        def kernel(a, b):
            return np.exp(-0.5 * ((a[:8] - b[:8]) ** 2).sum() / 8) + 0.5 + 0.7 * (a[8:] * b[8:]).sum() / 8

        stock = KernelRidge(alpha=0.3, kernel=kernel).fit(x, 2.0 * np.eye(3)[labels.numpy()] - 1.0)
        with torch.no_grad():
            found = (head(features) / head.temperature).numpy()
        assert np.allclose(found, stock.predict(x), atol=5e-3)

    def test_is_restored(self):
        features, labels = blobs(150, 0, dim=20)
        head = self.make()
        head.fit(features, labels)
        again = SketchHead.build(json.loads(json.dumps(head.config())))
        again.load_state_dict(head.state_dict())
        with torch.no_grad():
            assert torch.equal(again(features), head(features))


class TestMethod:
    def test_nothing_that_is_sent_depends_on_labels(self, tmp_path: Path, tiny_models, film_examples):
        """Byte for byte: two runs with opposite labels send the same requests in the same order."""
        sent = []
        for flip in (0, 1):
            folder = tmp_path / str(flip)
            pool = local_operators(load_backbone(str(tiny_models["bert"])), record=[folder])

            def connect(_count: int, pool=pool, **options):
                return Backbone(pool, max_length=32, **options)

            bodies = record_posts(pool.operators[0].transport)
            model = fitted(connect, film_examples, count=40, flip=flip)
            evaluate(model, film_examples.take(range(40, 60)))
            model.backbone.close()
            events = Transcript(folder).events
            assert {(event.kind, tuple(event.adapters)) for event in events} == {("forward", ())}
            assert {event.directions.count for event in events if event.directions} == {8, 1}
            view = read_view(Transcript(folder), "a")
            assert (view.checkpoints, view.gradients, view.sightings) == ([], [], [])
            sent.append(bodies)
        assert len(sent[0]) > 4
        assert sent[0] == sent[1]

    def test_learns_from_the_sketch_alone(self, film_examples, monkeypatch):
        """On MiniLM; with shuffled labels it learns nothing."""
        monkeypatch.setattr("blindtune.labels.methods.tangent_sketch.WEIGHTS", (100.0,))
        backbone = Backbone(local_operators("minilm", count=1), max_length=24, num_adapters=0)
        texts, test = [str(t) for t in film_examples.texts[:160]], film_examples.take(range(160, 260))
        scores = []
        for labels in (film_examples.labels[:160], torch.arange(160) % 2):
            method = TangentSketch(directions=4, rank=2)
            model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), method)
            model.prepare(texts, labels)
            scores.append(evaluate(model, test)["accuracy"])
        backbone.close()
        assert scores[0] > 0.62 > scores[1]

    def test_costs_no_budget_and_needs_one_operator(self, connect, film_examples):
        model = fitted(connect, film_examples, count=20)
        assert (model.method.label_mu, model.method.ledger, model.method.num_adapters) == (0.0, None, 0)
        assert "nothing about labels" in exposure(model, 1)[0]

    def test_a_checkpoint_predicts_the_same(self, connect, film_examples, tmp_path):
        model = fitted(connect, film_examples)
        model.save_pretrained(tmp_path, classes=["bad", "good"])
        summary = read_summary(tmp_path, LabelsSummary)
        options = {name: value for name, value in readout_of(summary).items() if name != "max_length"}
        again = PrivateModel.from_pretrained(tmp_path, connect(1, num_adapters=0, **options))
        texts = [str(t) for t in film_examples.texts[200:220]]
        with torch.no_grad():
            assert torch.equal(model(texts).logits, again(texts).logits)
        assert again.method == model.method

    def test_more_directions_than_the_server_offers_fail_before_texts_are_sent(self, connect, film_examples):
        backbone = connect(1, num_adapters=0)
        before = backbone.traffic.requests
        with pytest.raises(ConfigError, match="65 directions") as caught:
            PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), TangentSketch(directions=65, rank=2))
        assert "fewer" in caught.value.remedy
        assert backbone.traffic.requests == before

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"blocks": "lower"}, "lower"),
            ({"directions": 0}, "= 0"),
            ({"rank": 0}, "rank"),
            ({"size": -1}, "size"),
        ],
    )
    def test_options_out_of_range(self, options, words):
        with pytest.raises(ConfigError, match=words):
            make_method("tangent-sketch", options)
