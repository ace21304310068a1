"""Features: the best classifier on frozen states, chosen on the client; what is sent doesn't depend on labels."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge

from blindtune.errors import CheckpointError, ConfigError
from blindtune.labels import Features, KernelHead, LinearHead, PrivateModel, TwoLayerHead, evaluate, readout_of
from blindtune.labels.classifiers import choose, layer_groups
from blindtune.labels.head import CENTRES
from blindtune.training import LabelsSummary, read_summary
from tests.labels.conftest import bodies_of


def blobs(count: int, seed: int, dim: int = 12, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Features whose class is one of `classes` directions, so that every classifier can learn it."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=random)
    return torch.randn(count, dim, generator=random) + 2.0 * torch.nn.functional.one_hot(labels, dim), labels


def rings(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features whose class is a radius: no linear classifier can learn it."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=random)
    points = torch.nn.functional.normalize(torch.randn(count, 4, generator=random), dim=1)
    return points * (1.0 + 1.5 * labels.unsqueeze(1)) + 0.1 * torch.randn(count, 4, generator=random), labels


class TestHeads:
    @pytest.mark.parametrize("kind", [LinearHead, KernelHead, TwoLayerHead])
    def test_learn_and_are_restored(self, kind):
        features, labels = blobs(400, 0)
        head = kind(12, 3)
        head.fit(features, labels)
        new, truth = blobs(300, 1)
        with torch.no_grad():
            assert float((head(new).argmax(1) == truth).float().mean()) > 0.75
        again = kind.build(json.loads(json.dumps(head.config())))
        again.load_state_dict(head.state_dict())
        with torch.no_grad():
            assert torch.equal(again(new), head(new))

    def test_kernel_regression_agrees_with_scikit_learn(self):
        features, labels = rings(200, 0)
        head = KernelHead(4, 2, gamma=0.5, ridge=0.3)
        head.fit(features, labels)
        x = ((features - head.mean) / head.scale).numpy()

        def kernel(a, b):
            return np.exp(-0.5 * ((a - b) ** 2).sum() / 4) + 0.5

        stock = KernelRidge(alpha=0.3, kernel=kernel).fit(x, 2.0 * np.eye(2)[labels.numpy()] - 1.0)
        with torch.no_grad():
            found = (head(features) / head.temperature).numpy()
        assert np.allclose(found, stock.predict(x), atol=1e-3)

    def test_a_kernel_learns_what_no_linear_head_can(self):
        (features, labels), (new, truth) = rings(600, 0), rings(300, 1)
        for kind, low, high in ((LinearHead, 0.3, 0.7), (KernelHead, 0.95, 1.01), (TwoLayerHead, 0.0, 1.01)):
            head = kind(4, 2)
            head.fit(features, labels)
            with torch.no_grad():
                assert low < float((head(new).argmax(1) == truth).float().mean()) < high

    def test_more_examples_than_centres(self, monkeypatch):
        monkeypatch.setattr("blindtune.labels.head.CENTRES", 100)
        (features, labels), (new, truth) = rings(900, 0), rings(300, 1)
        head = KernelHead(4, 2)
        head.fit(features, labels)
        assert len(head.centres) == 100 < CENTRES
        with torch.no_grad():
            assert float((head(new).argmax(1) == truth).float().mean()) > 0.95

    def test_parts_are_those_layers_alone(self):
        features, labels = blobs(100, 0)
        head = LinearHead(12, 3, parts=[0, 2], of=3)
        head.fit(features, labels)
        changed = features.clone()
        changed[:, 4:8] += 5.0
        with torch.no_grad():
            assert torch.equal(head(changed), head(features))
            assert not torch.equal(head(features + 1.0), head(features))


class TestChoice:
    def test_takes_the_layers_and_the_classifier_that_hold_out_best(self):
        features, labels = rings(700, 0)
        noise = torch.randn(700, 4, generator=torch.Generator().manual_seed(1))
        groups = {"the last layer": [0], "all layers": [0, 1], "noise": [1]}
        choice = choose(torch.cat([features, noise], 1), labels, 2, groups, 2)
        assert (choice.chosen.layers, choice.chosen.kind) == ("the last layer", "rbf")
        assert choice.chosen.accuracy == max(c.accuracy for c in choice.tried) > 0.95
        assert len({c.layers for c in choice.tried}) == 3

    def test_is_the_same_each_time(self):
        features, labels = blobs(200, 3)
        first, second = (choose(features, labels, 3, {"all": [0]}, 1) for _ in range(2))
        assert [c.accuracy for c in first.tried] == [c.accuracy for c in second.tried]

    @pytest.mark.parametrize("count", [2, 3, 5])
    def test_works_with_very_few_examples(self, count: int):
        features, _ = blobs(count, 0)
        choose(features, torch.arange(count) % 2, 2, {"all": [0]}, 1)

    def test_of_one_example_is_refused(self):
        with pytest.raises(ConfigError, match="1 example"):
            choose(torch.zeros(1, 4), torch.zeros(1).long(), 2, {"all": [0]}, 1)

    def test_groups_of_layers(self):
        assert layer_groups([], 7, "joint") == {"the last layer": [0]}
        assert layer_groups([0, 1, 2, 3], 4, "joint") == {
            "the last layer": [3], "the upper layers": [2, 3], "all layers": [0, 1, 2, 3],
        }  # fmt: skip
        assert layer_groups([1, 3], 4, "both", "last") == {
            "the last layer of pairs": [1],
            "the last layer of pairs and of each text": [1, 3, 5],
        }
        assert layer_groups([1, 3], 4, "apart", "all") == {"all layers of each text": [0, 1, 2, 3]}


def fitted(connect, film_examples, *, count: int = 160, **options):
    """A model fitted on `count` reviews, over one operator."""
    backbone = connect(1, readout="all", num_adapters=0)
    texts, labels = [str(t) for t in film_examples.texts[:count]], film_examples.labels[:count]
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), Features(**options))
    model.prepare(texts, labels)
    return model


class TestMethod:
    def test_nothing_that_is_sent_depends_on_labels(self, connect, film_examples):
        """Byte for byte: two runs with opposite labels send the same requests, for training and for predictions."""
        sent = []
        for flip in (0, 1):
            backbone = connect(1, readout="all", num_adapters=0)
            sent.append(bodies_of(backbone))
            texts = [str(t) for t in film_examples.texts[:40]]
            labels = [label ^ flip for label in film_examples.labels[:40]]
            model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), Features(classifier="logistic"))
            model.prepare(texts, labels)
            evaluate(model, film_examples.take(range(40, 60)))
        assert sent[0] == sent[1]
        assert {path.rsplit("/", 1)[1] for path, _ in sent[0]} == {"forward"}

    def test_costs_no_budget_and_needs_one_operator(self, connect, film_examples):
        model = fitted(connect, film_examples, classifier="logistic")
        assert (model.method.label_mu, model.method.ledger, model.method.num_adapters) == (0.0, None, 0)

    def test_a_checkpoint_predicts_the_same(self, connect, film_examples, tmp_path):
        model = fitted(connect, film_examples)
        model.save_pretrained(tmp_path, classes=["bad", "good"])
        summary = read_summary(tmp_path, LabelsSummary)
        again = PrivateModel.from_pretrained(tmp_path, connect(1, num_adapters=0, **only_readout(summary)))
        texts = [str(t) for t in film_examples.texts[200:220]]
        with torch.no_grad():
            assert torch.equal(model(texts).logits, again(texts).logits)
        assert type(again.head) is type(model.head)

    def test_a_checkpoint_of_other_layers_is_refused(self, connect, film_examples, tmp_path):
        fitted(connect, film_examples, classifier="logistic").save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="reads") as caught:
            PrivateModel.from_pretrained(tmp_path, connect(1, num_adapters=0))
        assert "readout_of" in caught.value.remedy

    def test_a_module_of_ones_own_is_kept(self, connect, film_examples):
        backbone = connect(1, num_adapters=0)
        head = torch.nn.Linear(backbone.hidden_size, 2)
        model = PrivateModel(backbone, head, Features())
        model.prepare([str(t) for t in film_examples.texts[:20]], film_examples.labels[:20])
        assert (model.head, model.choice) == (head, None)

    @pytest.mark.parametrize(("options", "words"), [({"layers": "lower"}, "lower"), ({"classifier": "svm"}, "svm")])
    def test_options_that_do_not_exist(self, options, words):
        with pytest.raises(ConfigError, match=words):
            Features(**options)


def only_readout(summary: LabelsSummary) -> dict:
    """The arguments that the fixture's backbone doesn't set itself."""
    return {name: value for name, value in readout_of(summary).items() if name != "max_length"}
