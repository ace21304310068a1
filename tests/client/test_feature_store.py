"""Readout over the wire, and the store of frozen features: no text is sent twice, whatever ends in between."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from blindtune.client import Backbone, FeatureStore, select_layers
from blindtune.client.feature_store import FILE
from blindtune.errors import BodyTooLarge, CheckpointError, ConfigError, UnknownReadout
from blindtune.models import FrozenBackbone
from blindtune.server.engine import Call
from blindtune.server.routes.hidden import check_hidden
from blindtune.wire import Limits, Pooling, Projection, Readout
from tests.conftest import Server
from tests.models.test_lora import batch
from tests.tiny import HIDDEN, LAYERS

Connect = Callable[..., Backbone]
LoadTiny = Callable[..., FrozenBackbone]
ALL = tuple(range(LAYERS + 1))


def here(backbone: Backbone, model: FrozenBackbone, texts: list[str]) -> torch.Tensor:
    """The hidden states that the hosted model computes in this process, one text at a time."""
    rows = backbone.rows(texts)
    hidden = [model.forward(backbone.tokenizer.pad([row]), backbone.readout)[0, 0] for row in rows]
    if backbone.pooling == "none":
        return torch.nn.utils.rnn.pad_sequence(hidden, batch_first=True)
    return torch.stack(hidden)


class TestReadout:
    @pytest.mark.parametrize("pooling", ["mean", "max", "cls", "none"])
    @pytest.mark.parametrize("codec", ["fp32", "fp16", "int8"])
    def test_every_layer_crosses_the_wire(
        self, pooling: str, codec: str, tiny_server: Server, tiny_backbone: LoadTiny, connect: Connect,
        film_sentences: list[str],
    ):  # fmt: skip
        backbone = connect(tiny_server, model="bert", num_adapters=0, readout="all", pooling=pooling, codec=codec)
        texts = film_sentences[:9]
        expected = here(backbone, tiny_backbone("bert"), texts)
        found = backbone.frozen(texts)
        assert found.shape == expected.shape
        assert found.shape[-1] == backbone.hidden_size == (LAYERS + 1) * HIDDEN
        states = expected.unflatten(-1, (LAYERS + 1, HIDDEN))
        step = {"fp32": 1e-5, "fp16": 2**-9, "int8": 1.5 / 127}[codec] * float(states.abs().max())
        assert float((found - expected).abs().max()) < step

    def test_bytes_follow_the_codec_and_padding_is_not_sent(
        self, tiny_server: Server, connect: Connect, film_sentences: list[str]
    ):
        received = {}
        for codec in ("fp32", "fp16", "int8"):
            backbone = connect(
                tiny_server, model="bert", num_adapters=0, readout="all", pooling="none", codec=codec,
                projection=Projection(seed="1" * 64, size=16),
            )  # fmt: skip
            before = backbone.traffic.received
            backbone.frozen(film_sentences[:40])
            received[codec] = backbone.traffic.received - before
        tokens = sum(len(row) for row in backbone.rows(film_sentences[:40]))
        assert received["int8"] < 1.3 * tokens * (LAYERS + 1) * 18 + 4000
        assert received["int8"] < 0.65 * received["fp16"] < 0.4 * received["fp32"]

    def test_adapters_learn_through_every_layer(self, tiny_server: Server, connect: Connect, film_sentences: list[str]):
        backbone = connect(tiny_server, model="bert", readout=[0, 2, 3])
        hidden = backbone(film_sentences[:4])
        assert hidden.shape == (4, 3 * HIDDEN)
        hidden[:, HIDDEN:].square().sum().backward()
        gradients = [p.grad for p in backbone.parameters() if p.grad is not None]
        assert any(float(gradient.abs().max()) > 0 for gradient in gradients)

    def test_pairs_are_read_as_one_sequence_and_apart(self, tiny_server: Server, connect: Connect):
        pairs = [("the film is good", "a good film"), ("bad", "the plot is bad and long")]
        options = {"model": "bert", "num_adapters": 0, "readout": [1, 3]}
        both = connect(tiny_server, pairs="both", **options)
        alone = connect(tiny_server, **options)
        u, v = (alone.frozen([pair[side] for pair in pairs]) for side in (0, 1))
        expected = torch.cat([alone.frozen(pairs), (u - v).abs(), u * v], dim=-1)
        assert both.hidden_size == expected.shape[1]
        assert torch.allclose(both.frozen(pairs), expected, atol=1e-5)
        apart = connect(tiny_server, pairs="apart", **options).frozen(pairs)
        assert torch.allclose(apart, expected[:, 2 * HIDDEN :], atol=1e-5)

    def test_names_of_layers(self, tiny_backbone: LoadTiny):
        info = tiny_backbone("bert").info("bert", Limits())
        assert (select_layers(info, "last"), select_layers(info, [LAYERS])) == ((), ())
        assert (select_layers(info, "all"), select_layers(info, "upper")) == (ALL, (2, 3))
        assert select_layers(info, [3, 0]) == (0, 3)
        assert select_layers(tiny_backbone("opt").info("opt", Limits()), "all") == ()


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"readout": [LAYERS + 1]}, UnknownReadout, f"no layer {LAYERS + 1}"),
            ({"readout": "lower"}, UnknownReadout, "no layers 'lower'"),
            ({"readout": []}, UnknownReadout, "has no layers"),
            ({"projection": Projection(seed="0" * 64, size=HIDDEN + 1)}, UnknownReadout, f"to {HIDDEN + 1} values"),
            ({"codec": "int7"}, ConfigError, "no codec 'int7'"),
            ({"pairs": "apart", "num_adapters": 1}, ConfigError, "one sequence"),
            ({"pairs": "apart", "pooling": "none"}, ConfigError, "'none'"),
        ],
    )
    def test_before_any_text_is_sent(self, options, error, words: str, tiny_server: Server, connect: Connect):
        with pytest.raises(error, match=words) as caught:
            connect(tiny_server, model="bert", **{"num_adapters": 0, **options})
        assert caught.value.remedy

    def test_single_texts_are_no_pairs(self, tiny_server: Server, connect: Connect, film_sentences: list[str]):
        backbone = connect(tiny_server, model="bert", num_adapters=0, pairs="both")
        before = backbone.traffic.requests
        with pytest.raises(ConfigError, match="single texts"):
            backbone.frozen(film_sentences[:2])
        assert backbone.traffic.requests == before

    @pytest.mark.parametrize("pooling", ["mean", "none"])
    def test_an_answer_over_the_servers_limit(self, pooling: Pooling):
        """The size is checked before the pass: 4 texts of 16 tokens, four layers of 8 values."""
        readout = Readout(pooling=pooling, layers=ALL)
        size = 4 * 4 * (16 if pooling == "none" else 1) * 4 * 8
        call = Call("ann", [], readout, None, batch(4, 16))
        check_hidden(call, 8, Limits(max_answer_bytes=size))
        with pytest.raises(BodyTooLarge, match=f"hidden states would have {size} bytes"):
            check_hidden(call, 8, Limits(max_answer_bytes=size - 1))


class TestStore:
    def open(self, folder: Path, server: Server, connect: Connect, **options: object) -> Backbone:
        given = {"model": "bert", "num_adapters": 0, "readout": "all", "store": folder, **options}
        return connect(server, **given)

    @pytest.mark.parametrize("codec", ["fp32", "int8"])
    @pytest.mark.parametrize("pooling", ["mean", "none"])
    def test_a_second_run_sends_nothing_and_reads_the_same(
        self, codec: str, pooling: str, tmp_path: Path, tiny_server: Server, connect: Connect,
        film_sentences: list[str],
    ):  # fmt: skip
        first = self.open(tmp_path, tiny_server, connect, codec=codec, pooling=pooling)
        texts = film_sentences[:30]
        hidden = first.frozen(texts)
        first.close()
        second = self.open(tmp_path, tiny_server, connect, codec=codec, pooling=pooling)
        before = second.traffic.requests
        assert torch.equal(second.frozen(texts), hidden)
        assert second.traffic.requests == before
        second.frozen([*texts, "a text that no run has sent"])
        assert second.traffic.requests == before + 1

    def test_other_readouts_codecs_and_models_have_entries_of_their_own(
        self, tmp_path: Path, tiny_server: Server, connect: Connect, film_sentences: list[str]
    ):
        self.open(tmp_path, tiny_server, connect).frozen(film_sentences[:3])
        for options in ({"readout": "last"}, {"pooling": "cls"}, {"codec": "fp16"}, {"model": "roberta"},
                        {"projection": Projection(seed="2" * 64, size=4)}):  # fmt: skip
            other = self.open(tmp_path, tiny_server, connect, **options)
            expected = connect(tiny_server, **{"model": "bert", "num_adapters": 0, "readout": "all", **options})
            assert torch.equal(other.frozen(film_sentences[:3]), expected.frozen(film_sentences[:3]))

    def test_what_was_fetched_before_a_failure_is_kept(
        self, tmp_path: Path, tiny_server: Server, connect: Connect, film_sentences: list[str]
    ):
        backbone = self.open(tmp_path, tiny_server, connect)
        done: list[int] = []

        def fail(count: int) -> None:
            done.append(count)
            raise KeyboardInterrupt

        backbone.on_infer = fail
        with pytest.raises(KeyboardInterrupt):
            backbone.frozen([text * 20 for text in film_sentences])
        stored = sqlite3.connect(tmp_path / FILE).execute("SELECT COUNT(*) FROM features").fetchone()[0]
        assert stored >= done[0] > 0

    def test_only_the_owner_can_read_it(self, tmp_path: Path):
        FeatureStore(tmp_path / "new" / "store").close()
        assert stat.S_IMODE((tmp_path / "new" / "store" / FILE).stat().st_mode) == 0o600

    def test_old_entries_make_room(self, tmp_path: Path, tiny_server: Server, connect: Connect, film_sentences):
        entry = 4 * (LAYERS + 1) * HIDDEN
        backbone = self.open(tmp_path, tiny_server, connect, store=FeatureStore(tmp_path, max_bytes=10 * entry))
        backbone.frozen(film_sentences[:8])
        backbone.frozen(film_sentences[8:20])
        backbone.close()
        stored = sqlite3.connect(tmp_path / FILE).execute("SELECT COUNT(*) FROM features").fetchone()[0]
        assert stored == 10
        newest = self.open(tmp_path, tiny_server, connect)
        before = newest.traffic.requests
        newest.frozen(film_sentences[18:20])
        assert newest.traffic.requests <= before + 1

    @pytest.mark.parametrize("how", ["no database", "cut", "a byte"])
    def test_a_damaged_store_is_refused_before_anything_is_sent(
        self, how: str, tmp_path: Path, tiny_server: Server, connect: Connect, film_sentences: list[str]
    ):
        first = self.open(tmp_path, tiny_server, connect)
        first.frozen(film_sentences[:50])
        first.close()
        path = tmp_path / FILE
        if how == "a byte":
            database = sqlite3.connect(path)
            key, value = database.execute("SELECT key, value FROM features").fetchone()
            database.execute("UPDATE features SET value = ? WHERE key = ?", (bytes([value[0] ^ 1]) + value[1:], key))
            database.commit()
            database.close()
        else:
            content = path.read_bytes()
            path.write_bytes(b"not a database " * 100 if how == "no database" else content[: len(content) // 2])
        sent: list[int] = []

        def read() -> None:
            other = connect(tiny_server, model="bert", num_adapters=0, readout="all", store=FeatureStore(tmp_path))
            before = other.traffic.requests
            try:
                other.frozen(film_sentences[:50])
            finally:
                sent.append(other.traffic.requests - before)

        with pytest.raises(CheckpointError, match=r"features\.sqlite") as caught:
            read()
        assert not any(sent)
        assert "Delete the file" in caught.value.remedy
        assert path.exists()
