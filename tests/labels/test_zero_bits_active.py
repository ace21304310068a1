"""Operators that lie, or that have small limits, to learn something from methods that send nothing about labels.

Each of these attacks learned something about labels from an earlier version: whether the client went on after the fit,
or the order of a file that is sorted by label, from texts that were sent again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import RLock
from typing import Any

import pytest
import tokenizers
import torch
from torch import Tensor, nn

from blindtune.client import Backbone, Operator, OperatorPool, Transport
from blindtune.data import Examples
from blindtune.errors import PrivacyError
from blindtune.labels import Features, KernelHead, LinearHead, PrivateModel, Side, TangentSketch, evaluate, predict
from blindtune.labels.head import CENTRES
from blindtune.local import InProcess
from blindtune.models import FrozenBackbone, Tokenizer, load_backbone
from blindtune.server import ServerSettings, create_app
from blindtune.wire import Limits

Rows = list[tuple[int, ...]]
Lie = Callable[[Rows, Tensor], Tensor]
METHODS = {
    "features": Features,
    "side": lambda: Side(epochs=1),
    "tangent-sketch": lambda: TangentSketch(directions=8, size=8, rank=2),
}


class Watching(Operator):
    """An operator in this process that notes the texts of each request, and may change its answers."""

    def __init__(self, backbone: FrozenBackbone, limits: Limits) -> None:
        app = create_app({"model": backbone}, ServerSettings(limits=limits, log_requests=False))
        super().__init__(Transport("http://operator", http=InProcess(app, RLock())), None)
        self.requests: list[Rows] = []
        self.lie: Lie | None = None
        self.lie_on_tangents: Lie | None = None

    def forward(self, tokens, uploads, readout, seed, *, retain=False, codec="fp32"):
        rows = self._note(tokens)
        hidden = super().forward(tokens, uploads, readout, seed, retain=retain, codec=codec)
        return hidden if self.lie is None or hidden is None else self.lie(rows, hidden)

    def tangents(self, tokens, readout, directions, *, codec="fp16"):
        rows = self._note(tokens)
        hidden = super().tangents(tokens, readout, directions, codec=codec)
        return hidden if self.lie_on_tangents is None else self.lie_on_tangents(rows, hidden)

    def _note(self, tokens: Any) -> Rows:
        rows = [
            tuple(ids[:length]) for ids, length in zip(tokens.input_ids.tolist(), tokens.lengths.tolist(), strict=True)
        ]
        self.requests.append(rows)
        return rows


Make = Callable[..., tuple[PrivateModel, Watching]]


@pytest.fixture(scope="module")
def bert(tiny_models: dict[str, Path]) -> FrozenBackbone:
    return load_backbone(str(tiny_models["bert"]))


@pytest.fixture
def make(bert: FrozenBackbone) -> Generator[Make]:
    """`make(method, max_tokens=…, **options)`: an untrained model and its operator."""
    opened: list[Backbone] = []

    def model(method: str, *, classes: int = 2, max_tokens: int = 65536, **options: Any):
        operator = Watching(bert, Limits(max_tokens=max_tokens))
        algorithm = METHODS[method]()
        reads = {name: value for name, value in algorithm.reads.items() if name != "pairs"}
        backbone = Backbone(OperatorPool([operator]), num_adapters=0, max_length=32, **reads, **options)
        opened.append(backbone)
        return PrivateModel(backbone, LinearHead(backbone.hidden_size, classes), algorithm), operator

    yield model
    for backbone in opened:
        backbone.close()


@pytest.fixture(scope="module")
def texts(film_sentences: list[str]) -> list[str]:
    return list(dict.fromkeys(film_sentences))[:340]


@pytest.mark.parametrize("method", METHODS)
def test_no_text_is_sent_twice_however_little_memory_there_is(make: Make, texts: list[str], method: str):
    """Texts that are sent again come in batches of the file's order, and so by label where it is sorted."""
    model, operator = make(method, memory=50_000)
    model.fetch(texts[:100])
    sent = len(operator.requests)
    model.prepare(texts[:80], [0] * 40 + [1] * 40)
    evaluate(model, Examples(texts[80:100], [0] * 10 + [1] * 10, ["no", "yes"]))
    assert len(operator.requests) == sent
    known = {row for request in operator.requests for row in request}
    assert len(known) == len({row.ids for row in model.backbone.rows(texts[:100])})


@pytest.mark.parametrize("method", METHODS)
def test_states_on_disk_are_those_in_memory(make: Make, texts: list[str], method: str):
    chances = []
    for memory in (2**30, 50_000):
        model, _ = make(method, memory=memory)
        model.prepare(texts[:80], [i % 2 for i in range(80)])
        chances.append(predict(model, texts[80:100]))
    assert torch.equal(*chances)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_tokens", [128, 65536])
def test_the_order_of_the_file_is_not_sent(make: Make, texts: list[str], method: str, max_tokens: int):
    """Predictions are computed in chunks. Before, a server with a small limit got those without long texts again."""
    seen, short = [], [" ".join(text.split()[:4]) for text in texts]
    some = list(dict.fromkeys([*short, max(texts, key=len)]))
    for seed in (0, 1):
        model, operator = make(method, max_tokens=max_tokens)
        model.prepare(texts[:20], [i % 2 for i in range(20)])
        shuffled = random.Random(seed).sample(some, len(some))
        predict(model, shuffled)
        seen.append(operator.requests)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_sent_while_labels_are_used(make: Make, texts: list[str], method: str):
    model, operator = make(method)
    model.fetch(texts[:60])
    sent = len(operator.requests)
    with model.backbone.offline(), pytest.raises(PrivacyError, match="not fetched before labels"):
        predict(model, texts[60:70])
    assert len(operator.requests) == sent
    model.prepare(texts[:40], [i % 2 for i in range(40)])
    assert len(operator.requests) == sent


def test_batches_of_a_loop_with_labels_are_not_sent(make: Make, texts: list[str]):
    """Before, a loop without `prepare` sent its batches, and with them what they have in common."""
    model, operator = make("features")
    with pytest.raises(PrivacyError, match="fetch"):
        model(texts[:8], torch.zeros(8, dtype=torch.long))
    assert not operator.requests
    model.fetch(texts[:8])
    assert model(texts[:8], torch.zeros(8, dtype=torch.long)).loss is not None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trick", ["dropout", "padding"])
def test_no_tokenizer_makes_a_text_look_new(make: Make, texts: list[str], method: str, trick: str):
    """The operator chooses the tokenizer. Before, a text whose tokens had changed was sent again, with its batch."""
    model, operator = make(method)
    chosen = tokenizers.Tokenizer.from_str(model.backbone.tokenizer.json)
    if trick == "padding":
        chosen.enable_padding()
    else:
        letters = " abcdefghijklmnopqrstuvwxyz"
        merges = [(a, b) for a, b in ("th", "he", "in", "er", "an", "on", "re", "at", "or", "es", "it", "is")]
        vocabulary = {token: index for index, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
        chosen = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, dropout=0.5, unk_token=" "))
        drawn = {tuple(chosen.encode(texts[0].lower()).ids) for _ in range(5)}
        assert len(drawn) > 1  # the trick works
    backbone = model.backbone
    backbone.tokenizer = Tokenizer(chosen.to_str(), pad_token_id=0, with_types=True)
    some = [text.lower()[:30] for text in texts[:40]]
    model.fetch(some)
    sent = len(operator.requests)
    model.prepare(some[:20], [0] * 10 + [1] * 10)
    for part in (some[20:30], some[30:40], [*some[5:8], some[20]]):
        predict(model, part)
    assert len(operator.requests) == sent


def test_threads_send_no_text_twice(make: Make, texts: list[str]):
    model, operator = make("features", memory=50_000)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda start: model.backbone.frozen(texts[start : start + 60]), [0, 20, 40, 0, 20, 40]))
    sent = [row for request in operator.requests for row in request]
    assert len(sent) == len(set(sent))


HUGE = (2.2e38, -2.2e38, 2.2e38)


def test_huge_answers_for_three_texts_end_no_fit(make: Make, texts: list[str]):
    """The mean overflowed only where two of the texts were in one fold; which are depends on labels."""
    for flip in (None, *range(23, 36)):
        labels = [i % 2 for i in range(36)]
        if flip is not None:
            labels[flip] = 1 - labels[flip]
        model, operator = make("tangent-sketch")
        chosen = [row.ids for row in model.backbone.rows([texts[i] for i in (3, 10, 20)])]

        def lie(rows: Rows, hidden: Tensor, chosen: list[Any] = chosen) -> Tensor:
            answer = torch.zeros_like(hidden)
            for index, row in enumerate(rows):
                if row in chosen:
                    answer[:, index] = HUGE[chosen.index(row)]
            return answer

        operator.lie_on_tangents = lie
        model.prepare(texts[:36], labels)
        predict(model, texts[36:46])


def answers(seed: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """States that make a fit difficult."""
    random_ = torch.Generator().manual_seed(seed)
    return {
        "constant": lambda hidden: torch.ones_like(hidden),
        "zero": lambda hidden: torch.zeros_like(hidden),
        "huge": lambda hidden: 3e38 * torch.randn(hidden.shape, generator=random_).sign(),
        "tiny": lambda hidden: 1e-38 * torch.randn(hidden.shape, generator=random_),
        "of one value": lambda hidden: torch.randn(hidden.shape[:-1], generator=random_)[..., None].expand_as(hidden),
        "of one text": lambda hidden: torch.cat([torch.full_like(hidden[:, :1], 3e38), hidden[:, 1:]], 1),
    }


@pytest.mark.parametrize("kind", list(answers(0)))
@pytest.mark.parametrize("method", METHODS)
def test_no_answer_ends_a_fit(make: Make, texts: list[str], method: str, kind: str):
    labelings = ([i % 2 for i in range(36)], [0] * 36, [int(i > 30) for i in range(36)])
    for labels in labelings[: 1 if method == "side" else 3]:  # whose fit takes seconds
        model, operator = make(method)
        lie = answers(0)[kind]
        operator.lie = operator.lie_on_tangents = lambda _rows, hidden, lie=lie: lie(hidden)
        model.prepare(texts[:36], labels)
        found = predict(model, texts[36:46])
        assert len(found) == 10


class TestHeads:
    @pytest.mark.parametrize("values", ["five clusters", "one dimension"])
    def test_nystrom_with_features_of_low_rank(self, values: str, monkeypatch: pytest.MonkeyPatch):
        """Before, Cholesky's method failed for some labels alone: those that made the kernel classifier win."""
        monkeypatch.setattr("blindtune.labels.head.CENTRES", 3000)
        generator = torch.Generator().manual_seed(0)
        few = torch.randint(5, (4000, 1), generator=generator).float()
        features = few.expand(4000, 8) if values == "five clusters" else torch.randn(4000, 1, generator=generator)
        labels = (few[:, 0] > 2).long()
        head = KernelHead(features.shape[1], 2, gamma=0.25, ridge=0.05)
        head.fit(features, labels)
        assert len(head.centres) == 3000 < CENTRES
        with torch.no_grad():
            logits = head(features)
        assert bool(torch.isfinite(logits).all())
        if values == "five clusters":
            assert torch.equal(logits.argmax(1), labels)

    @pytest.mark.parametrize("kind", [LinearHead, KernelHead])
    def test_numbers_as_large_as_float32_goes(self, kind: type[nn.Module]):
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(2, (60,), generator=generator)
        features = 3e38 * (2.0 * labels.float() - 1.0)[:, None].expand(60, 4)
        head = kind(4, 2)
        head.fit(features, labels)  # type: ignore[operator]
        with torch.no_grad():
            assert torch.equal(head(features).argmax(1), labels)
