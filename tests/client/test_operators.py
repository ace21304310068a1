"""Operators: checked against each other before the first step, and sent each adapter once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from blindtune.client import Backbone, Operator, OperatorPool, Timeout, Transport, Upload
from blindtune.errors import ConfigError, DuplicateOperator, OperatorsDiffer, OperatorUnreachable, UnknownModel
from blindtune.models import FrozenBackbone
from blindtune.wire import Readout
from tests.conftest import Server, StartServer, StrictServer
from tests.models.test_lora import batch, random_adapters
from tests.tiny import save_tiny_model

LoadTiny = Callable[..., FrozenBackbone]
Connect = Callable[..., Backbone]
MEAN = Readout(pooling="mean")


def pool(*urls: str, model: str | None = None) -> OperatorPool:
    return OperatorPool.connect([Transport(url, timeout=Timeout(2, 30, 5)) for url in urls], model)


class TestDuplicates:
    def test_one_address_twice_is_refused(self, two_servers: list[Server]):
        a, b = (server.url for server in two_servers)
        for urls in ((a, a), (a, b, a), (a, a + "/")):
            with pytest.raises(DuplicateOperator, match=a) as caught:
                pool(*urls)
            assert "once" in caught.value.remedy

    def test_one_server_under_two_names_is_refused_with_both(self, two_servers: list[Server]):
        a, b = (server.url for server in two_servers)
        alias = a.replace("127.0.0.1", "localhost")
        with pytest.raises(DuplicateOperator, match="same server") as caught:
            pool(a, b, alias)
        assert a in caught.value.message
        assert alias in caught.value.message

    def test_two_servers_are_fine(self, two_servers: list[Server]):
        assert len(pool(*(server.url for server in two_servers))) == 2


class TestChoiceOfModel:
    def test_may_be_left_out_where_a_server_hosts_one(self, two_servers: list[Server]):
        assert pool(two_servers[0].url).info.name == "minilm"

    def test_must_be_made_where_it_hosts_several(self, tiny_server: Server):
        with pytest.raises(UnknownModel, match="hosts 7 models: bert, roberta"):
            pool(tiny_server.url)

    def test_of_a_model_that_is_not_hosted_is_refused_with_what_there_is(self, two_servers: list[Server]):
        with pytest.raises(UnknownModel, match="'bert'") as caught:
            pool(*(server.url for server in two_servers), model="bert")
        assert "minilm" in caught.value.remedy


class TestPool:
    def test_without_servers_is_refused(self):
        with pytest.raises(ConfigError, match="No servers") as caught:
            pool()
        assert "--server" in caught.value.remedy

    def test_with_one_server_away_names_it(self, two_servers: list[Server]):
        away = "http://127.0.0.1:9"
        with pytest.raises(OperatorUnreachable, match=away):
            OperatorPool.connect(
                [Transport(url, timeout=Timeout(1, 5, 0.5)) for url in (two_servers[0].url, away)], None
            )

    def test_calls_run_at_the_same_time_and_keep_their_order(self, two_servers: list[Server]):
        from threading import Barrier

        operators, together = pool(*(server.url for server in two_servers)), Barrier(2)
        calls = [lambda i=i: (together.wait(30), i)[1] for i in range(2)]
        assert operators.parallel(calls) == [0, 1]

    def test_the_first_error_is_raised(self, two_servers: list[Server]):
        def fail() -> None:
            raise KeyError("x")

        with pytest.raises(KeyError):
            pool(*(server.url for server in two_servers)).parallel([lambda: None, fail])


class TestWeights:
    def test_that_differ_are_refused_before_the_first_step_and_when_a_server_comes_back_with_them(
        self, tiny_server: Server, tiny_models: dict[str, Path], start_server: StartServer, film_sentences: list[str],
        tmp_path: Path, connect: Connect,
    ):  # fmt: skip
        with start_server(f"bert={tiny_models['bert']}") as first:
            port = first.port
            backbone = connect([first, tiny_server], model="bert", max_length=16)
            backbone(film_sentences[:2]).sum().backward()
            first.kill()
        other = save_tiny_model("bert", tmp_path / "bert", film_sentences[:400], seed=1)
        with start_server(f"bert={other}", port=port) as second:
            assert second.url == first.url
            backbone(film_sentences[:2])  # this step is at the other operator
            with pytest.raises(OperatorsDiffer, match="other weights than at the start") as caught:
                backbone(film_sentences[:2])
            assert first.url in caught.value.message
            assert backbone.info.fingerprint[:12] in caught.value.message
            with pytest.raises(OperatorsDiffer, match="other weights than") as caught:
                connect([tiny_server, second], model="bert")
            assert second.url in caught.value.message
            assert tiny_server.url in caught.value.message


class TestAdapters:
    @pytest.fixture
    def uploads(self, tiny_backbone: LoadTiny) -> list[Upload]:
        _, adapters = random_adapters(tiny_backbone("bert"), LoraConfig(r=8, target_modules="all-linear"), 30)
        return [Upload.of("bert", adapter.layout.spec, adapter.vector().detach()) for adapter in adapters]

    def test_equal_weights_are_one_upload_and_other_weights_another(self, tiny_backbone: LoadTiny):
        _, (adapter,) = random_adapters(tiny_backbone("bert"), LoraConfig(), 1)
        spec, vector = adapter.layout.spec, adapter.vector().detach()
        assert Upload.of("bert", spec, vector) == Upload.of("bert", spec, vector.clone())
        changed = vector.clone()
        changed[5] = torch.nextafter(changed[5], torch.tensor(1.0))
        assert Upload.of("bert", spec, changed).sha256 != Upload.of("bert", spec, vector).sha256
        assert Upload.of("roberta", spec, vector).sha256 != Upload.of("bert", spec, vector).sha256

    def test_are_sent_once_however_often_they_are_used(self, tiny_server: Server, uploads: list[Upload]):
        operator = Operator(Transport(tiny_server.url), "bert")
        before = tiny_server.answered()
        for _ in range(3):
            hidden = operator.forward(batch(2, 4), uploads[:2], MEAN, None)
            assert hidden is not None
            operator.backward(batch(2, 4), uploads[:2], MEAN, None, torch.ones(1, *hidden.shape))
        grown = tiny_server.answered() - before
        assert grown["{sha256}"] == 2
        assert grown["forward"] == grown["backward"] == 3

    def test_that_the_server_has_forgotten_are_sent_again_without_a_word(
        self, strict_server: StrictServer, uploads: list[Upload]
    ):
        ann = Operator(strict_server.transport("ann"), "bert")
        bob = Operator(strict_server.transport("bob"), "bert")
        tokens = batch(3, 5)
        hidden = ann.forward(tokens, uploads[:2], MEAN, None)
        assert hidden is not None
        cotangents = torch.randn(1, *hidden.shape)
        gradients = ann.backward(tokens, uploads[:2], MEAN, None, cotangents)

        def crowd_out() -> None:
            """Another tenant fills both caches."""
            bob._uploaded.clear()
            for upload in uploads:
                bob.forward(batch(4, 10), [upload], MEAN, None)

        ann.forward(tokens, uploads[:2], MEAN, None)
        crowd_out()
        before = strict_server.server.answered(strict_server.trust)
        assert torch.equal(ann.backward(tokens, uploads[:2], MEAN, None, cotangents), gradients)
        crowd_out()
        again = ann.forward(tokens, uploads[:2], MEAN, None)
        assert again is not None
        assert torch.equal(again, hidden)
        grown = strict_server.server.answered(strict_server.trust) - before
        assert grown["{sha256}"] == 2 + len(uploads) + 2
        samples = strict_server.server.metrics(strict_server.trust)
        assert samples["blindtune_adapter_bytes"] <= 2**20
        assert samples["blindtune_graph_bytes"] <= 2**20
