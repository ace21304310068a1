"""The side network: it learns from the order of tokens' states, on the client alone."""

from __future__ import annotations

import pytest
import torch

from blindtune.client import Backbone
from blindtune.errors import ConfigError
from blindtune.labels import LinearHead, PrivateModel, Side, SideHead, evaluate, predict, readout_of
from blindtune.training import LabelsSummary, read_summary
from tests.labels.conftest import bodies_of
from tests.tiny import HIDDEN, LAYERS

READS = {"readout": "spread", "pooling": "none", "projection": 16, "codec": "int8", "num_adapters": 0}


def marked(count: int, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Texts of several lengths; a class is what one of the tokens is, which the mean over tokens hides."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=random)
    texts = []
    for label in labels.tolist():
        states = torch.randn(int(torch.randint(4, 12, (1,), generator=random)), 8, generator=random)
        states[0] = 0.0
        states[0, label] = 6.0
        texts.append(states)
    return texts, labels


class TestHead:
    def test_learns_what_one_token_says(self):
        (texts, labels), (new, truth) = marked(400, 0), marked(200, 1)
        head = SideHead(8, 2, width=16)
        head.fit_tokens(lambda indices: [texts[i] for i in indices], [len(t) for t in texts], labels)
        padded = torch.nn.utils.rnn.pad_sequence(new, batch_first=True)
        with torch.no_grad():
            assert float((head(padded).argmax(1) == truth).float().mean()) > 0.9

    def test_padding_changes_nothing(self):
        texts, labels = marked(60, 0)
        head = SideHead(8, 2, width=16, steps=20, epochs=1)
        head.fit_tokens(lambda indices: [texts[i] for i in indices], [len(t) for t in texts], labels)
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        with torch.no_grad():
            alone = torch.cat([head(text.unsqueeze(0)) for text in texts])
            assert torch.allclose(head(padded), alone, atol=1e-5)
            assert torch.allclose(head.logits((texts[0].unsqueeze(0) - head.mean) / head.scale), alone[:1], atol=1e-5)

    def test_is_the_same_each_time_and_reports_its_steps(self):
        texts, labels = marked(50, 0)
        seen: list[tuple[int, int]] = []
        heads = [SideHead(8, 2, width=8, steps=30, epochs=1) for _ in range(2)]
        for head in heads:
            head.fit_tokens(
                lambda indices: [texts[i] for i in indices], [len(t) for t in texts], labels,
                lambda done, total: seen.append((done, total)),
            )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(heads[0].parameters(), heads[1].parameters(), strict=True))
        assert seen[0] == (1, 30)
        assert seen[-1] == (30, 30)


def fitted(backbone: Backbone, film_examples, count: int = 60, **options) -> PrivateModel:
    texts, labels = [str(t) for t in film_examples.texts[:count]], film_examples.labels[:count]
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), Side(**{"epochs": 1, "width": 8, **options}))
    model.prepare(texts, labels)
    return model


class TestMethod:
    def test_a_text_costs_what_the_page_says(self, connect, film_examples):
        """A byte for each value of each token and layer, two more for each scale, and each text once."""
        backbone = connect(1, **READS)
        assert backbone.hidden_size == (LAYERS + 1) * 16 < (LAYERS + 1) * HIDDEN
        before = backbone.traffic.received
        fitted(backbone, film_examples)
        tokens = sum(len(row) for row in backbone.rows([str(t) for t in film_examples.texts[:60]]))
        received = backbone.traffic.received - before
        assert tokens * (LAYERS + 1) * 18 < received < tokens * (LAYERS + 1) * 18 + 20_000

    def test_nothing_that_is_sent_depends_on_labels(self, connect, film_examples):
        """Byte for byte: two runs with opposite labels send the same requests, for training and for predictions."""
        sent = []
        for flip in (0, 1):
            backbone = connect(1, **READS)
            sent.append(bodies_of(backbone))
            examples = film_examples.take(range(30))
            model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), Side(epochs=1, width=8))
            model.prepare([str(t) for t in examples.texts], [label ^ flip for label in examples.labels])
            evaluate(model, film_examples.take(range(30, 40)))
        assert sent[0] == sent[1]
        assert {path.rsplit("/", 1)[1] for path, _ in sent[0]} == {"forward"}

    def test_a_checkpoint_predicts_the_same(self, connect, film_examples, tmp_path):
        model = fitted(connect(1, **READS), film_examples)
        model.save_pretrained(tmp_path, classes=["bad", "good"])
        reads = {k: v for k, v in readout_of(read_summary(tmp_path, LabelsSummary)).items() if k != "max_length"}
        again = PrivateModel.from_pretrained(tmp_path, connect(1, num_adapters=0, **reads))
        texts = [str(t) for t in film_examples.texts[60:90]]
        assert torch.allclose(predict(model, texts), predict(again, texts), atol=1e-6)

    def test_pooled_states_are_refused(self, connect, film_examples):
        backbone = connect(1, num_adapters=0)
        with pytest.raises(ConfigError, match="reads every token"):
            PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), Side())
