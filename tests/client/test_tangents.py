"""Tangents over the wire: in chunks of directions, cached, kept on disk, and within the server's limits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from blindtune.client import Backbone
from blindtune.errors import AdapterMismatch, BodyTooLarge, ConfigError, RequestError, SequenceTooLong
from blindtune.models import FrozenBackbone
from blindtune.models.tangents import tangents
from blindtune.server.engine import Call
from blindtune.server.limits import check_batch, check_directions
from blindtune.server.routes.hidden import check_hidden
from blindtune.wire import Directions, ForwardRequest, Limits, Projection, Readout
from tests.conftest import Server
from tests.models.test_lora import batch
from tests.tiny import HIDDEN

Connect = Callable[..., Backbone]
LoadTiny = Callable[..., FrozenBackbone]
MODULES = ["encoder.layer.1.attention.self.query", "encoder.layer.2.output.dense"]


def along(count: int, **more: object) -> Directions:
    return Directions.model_validate({"modules": MODULES, "rank": 2, "seed": "5" * 64, "count": count, **more})


class TestTangents:
    @pytest.mark.parametrize("codec", ["fp32", "fp16"])
    @pytest.mark.parametrize("size", [None, 8])
    def test_are_those_of_the_hosted_model(
        self, codec, size, tiny_server: Server, tiny_backbone: LoadTiny, connect: Connect, film_sentences: list[str]
    ):
        backbone, model = connect(tiny_server, model="bert", num_adapters=0), tiny_backbone("bert")
        readout = Readout(pooling="mean", projection=None if size is None else Projection(seed="6" * 64, size=size))
        texts = film_sentences[:9]
        found = backbone.tangents(texts, along(11), readout=readout, codec=codec)
        rows = backbone.rows(texts)
        expected = torch.stack(
            [tangents(model, backbone.tokenizer.pad([row]), readout, along(11))[:, 0] for row in rows]
        )
        assert found.shape == expected.shape == (9, 11, size or HIDDEN)
        assert float((found - expected).norm() / expected.norm()) < 2e-3

    def test_no_text_is_sent_twice(
        self, tmp_path: Path, tiny_server: Server, connect: Connect, film_sentences: list[str]
    ):
        options = {"model": "bert", "num_adapters": 0, "store": tmp_path}
        first = connect(tiny_server, **options)
        texts = film_sentences[:20]
        found, frozen = first.tangents(texts, along(16)), first.frozen(texts)
        before = first.traffic.requests
        assert torch.equal(first.tangents([*texts, texts[0]], along(16))[:20], found)
        assert torch.equal(first.tangents(texts, along(8)), found[:, :8])
        assert first.traffic.requests == before
        first.close()
        second = connect(tiny_server, **options)
        before = second.traffic.requests
        assert torch.equal(second.tangents(texts, along(16)), found)
        assert torch.equal(second.frozen(texts), frozen)
        assert second.traffic.requests == before
        for other in (along(16, rank=3), along(16, seed="7" * 64)):
            assert not torch.equal(second.tangents(texts, other), found)
        assert second.traffic.requests > before

    def test_too_many_directions_fail_before_anything_is_sent(
        self, tiny_server: Server, connect: Connect, film_sentences: list[str]
    ):
        backbone = connect(tiny_server, model="bert", num_adapters=0)
        before = backbone.traffic.requests
        with pytest.raises(ConfigError, match="65 directions") as caught:
            backbone.tangents(film_sentences[:2], along(65))
        assert caught.value.remedy
        assert backbone.traffic.requests == before

    @pytest.mark.parametrize("more", [{"count": 65}, {"first": 64}, {"rank": 300}])
    def test_the_server_refuses_them_too(
        self, more: dict, tiny_server: Server, connect: Connect, film_sentences: list[str]
    ):
        backbone = connect(tiny_server, model="bert", num_adapters=0)
        tokens = backbone.tokenizer.pad(backbone.rows(film_sentences[:1]))
        with pytest.raises(AdapterMismatch, match="limit"):
            backbone.pool.operators[0].tangents(tokens, backbone.readout, along(**{"count": 1, **more}))


class TestLimits:
    def test_tokens_count_once_for_each_direction(self):
        check_batch(4, 8, 0, Limits(max_tokens=4 * 8 * 5), directions=5)
        with pytest.raises(SequenceTooLong, match="under 5 directions make 160 tokens"):
            check_batch(4, 8, 0, Limits(max_tokens=4 * 8 * 5 - 1), directions=5)
        check_directions(along(3, first=2), Limits(max_directions=5))
        with pytest.raises(AdapterMismatch, match="names 5 directions"):
            check_directions(along(3, first=2), Limits(max_directions=4))

    def test_an_answer_over_the_limit(self):
        call = Call("ann", [], Readout(pooling="mean"), None, batch(4, 16), along(5))
        check_hidden(call, 8, Limits(max_answer_bytes=4 * 5 * 4 * 8))
        with pytest.raises(BodyTooLarge):
            check_hidden(call, 8, Limits(max_answer_bytes=4 * 5 * 4 * 8 - 1))

    @pytest.mark.parametrize("more", [{"adapters": ["a" * 64]}, {"seed": 1}, {"retain": True}])
    def test_a_request_for_tangents_has_neither_adapters_nor_dropout(self, more: dict):
        with pytest.raises(ValueError, match="tangents"):
            ForwardRequest.model_validate({"pooling": "mean", "directions": along(1), **more})

    def test_modules_that_the_model_does_not_have(
        self, tiny_server: Server, connect: Connect, film_sentences: list[str]
    ):
        backbone = connect(tiny_server, model="bert", num_adapters=0)
        tokens = backbone.tokenizer.pad(backbone.rows(film_sentences[:1]))
        with pytest.raises(RequestError, match=r"no\.such"):
            backbone.pool.operators[0].tangents(tokens, backbone.readout, along(1, modules=["no.such"]))
