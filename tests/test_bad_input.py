"""Everything that can be wrong with a request: its own exception, the value, the remedy, and nobody else notices.

Every test runs while another client is between its forward and its backward pass on the same server. That client
must get the gradients that it would have got alone, from the graph that the server has kept for it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import socket
import warnings
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from blindtune.client import Backbone, Operator, Transport, Upload
from blindtune.errors import (
    AdapterMismatch,
    BodyTooLarge,
    EmptyBatch,
    InvalidTensor,
    MalformedMessage,
    NonFiniteTensor,
    RequestError,
    SequenceTooLong,
    Unauthenticated,
    UnknownAdapter,
    UnknownModel,
    UnknownReadout,
    UnknownTargetModule,
    UnsupportedVersion,
)
from blindtune.models import FrozenBackbone, LoraAdapter
from blindtune.wire import AdapterUpload, BackwardRequest, ForwardRequest, LoraSpec, NoiseShare, Readout, encode
from tests.conftest import StrictServer
from tests.models.test_lora import batch, random_adapters
from tests.tiny import HIDDEN, VOCABULARY

MODULE = "encoder.layer.0.attention.self.query"
SIZE = 4 * 2 * HIDDEN
"""Weights of a rank-4 adapter on one square layer."""


@pytest.fixture(scope="module")
def transport(strict_server: StrictServer) -> Generator[Transport]:
    connection = strict_server.transport("bob")
    yield connection
    connection.close()


class Bystander:
    """Another tenant, who trains while somebody sends nonsense."""

    def __init__(self, server: StrictServer, texts: list[str]) -> None:
        self.server, self.texts = server, texts
        self.backbone = Backbone(
            [server.url], model="bert", token=server.tokens["ann"], verify=server.trust, max_length=16
        )
        self.backbone.set_adapters(1, generator=torch.Generator().manual_seed(4))
        self.http = server.client()
        self.expected = self.gradients(self.forward())

    def forward(self) -> Tensor:
        return self.backbone(self.texts)

    def gradients(self, hidden: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(hidden.square().sum(), list(self.backbone.parameters())))

    def graphs_found(self) -> float:
        page = self.http.get("/metrics").text
        assert 'status="500"' not in page, "bad input is no fault of the server"
        return float(re.findall(r'blindtune_graphs_total\{result="retained"\} (\S+)', page)[0])


@pytest.fixture(scope="module")
def bystander(strict_server: StrictServer, film_sentences: list[str]) -> Generator[Bystander]:
    someone = Bystander(strict_server, film_sentences[:3])
    yield someone
    someone.backbone.close()
    someone.http.close()


@pytest.fixture(autouse=True)
def _another_client_is_in_the_middle_of_a_step(bystander: Bystander) -> Generator[None]:
    hidden = bystander.forward()
    yield
    before = bystander.graphs_found()
    found = bystander.gradients(hidden)
    assert all(torch.equal(a, b) for a, b in zip(found, bystander.expected, strict=True))
    assert bystander.graphs_found() == before + 1, "the graph must still have been there"
    assert bystander.server.server.process.alive


def refused(kind: type[RequestError], *words: str, remedy: str, call: Callable[[], Any]) -> None:
    """The call raises exactly this error, with these words, and says what to do."""
    with pytest.raises(RequestError) as caught:
        call()
    assert type(caught.value) is kind, str(caught.value)
    for word in words:
        assert word in caught.value.message
    assert remedy in caught.value.remedy
    assert caught.value.remedy


def upload(transport: Transport, weights: Tensor, **changes: Any) -> Callable[[], Any]:
    """Uploads an adapter for `bert`; changes go into its description."""
    model = changes.pop("model", "bert")
    spec = LoraSpec(**{"modules": [MODULE], "rank": 4, "scaling": 1.0, **changes})
    sent = Upload.of(model, spec, weights)
    return lambda: transport.put(f"/v1/adapters/{sent.sha256}", sent.body)


def an_adapter(transport: Transport) -> str:
    """The hash of a good adapter that is on the server."""
    upload(transport, torch.ones(SIZE))()
    return Upload.of("bert", LoraSpec(modules=[MODULE], rank=4, scaling=1.0), torch.ones(SIZE)).sha256


def forward(
    transport: Transport, model: str = "bert", adapters: list[str] | None = None, **changes: Any
) -> Callable[[], Any]:
    """A forward request for 3 rows of 5 tokens; changes replace tensors, or leave them out with None."""
    pooling = changes.pop("pooling", "mean")
    tensors = {**batch(3, 5).tensors(), **changes}
    request = ForwardRequest(adapters=adapters or [], pooling=pooling)
    body = encode(request, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    return lambda: transport.post(f"/v1/models/{model}/forward", body)


def backward(transport: Transport, cotangents: Tensor | None, adapters: list[str] | None = None) -> Callable[[], Any]:
    hashes = adapters or [an_adapter(transport)]
    tensors = dict(batch(3, 5).tensors())
    if cotangents is not None:
        tensors["cotangents"] = cotangents
    body = encode(BackwardRequest(adapters=hashes, pooling="mean"), tensors)
    return lambda: transport.post("/v1/models/bert/backward", body)


class TestTokens:
    def test_a_missing_token(self, strict_server: StrictServer):
        call = lambda: Operator(Transport(strict_server.url, verify=strict_server.trust), "bert")  # noqa: E731
        refused(Unauthenticated, "no bearer token", remedy="--token", call=call)

    def test_a_wrong_token(self, strict_server: StrictServer):
        transport = Transport(strict_server.url, token="bt_wrong", verify=strict_server.trust)
        call = lambda: Operator(transport, "bert")  # noqa: E731
        refused(Unauthenticated, "not known", remedy="Ask the provider", call=call)


class TestNames:
    def test_an_unknown_model(self, transport: Transport):
        refused(UnknownModel, "'gpt5'", remedy="bert, llama", call=lambda: Operator(transport, "gpt5"))
        refused(UnknownModel, "'gpt5'", remedy="bert, llama", call=forward(transport, "gpt5"))
        refused(UnknownModel, "'gpt5'", remedy="bert, llama", call=upload(transport, torch.ones(SIZE), model="gpt5"))

    def test_an_unknown_target_module(self, strict_server: StrictServer, transport: Transport, connect: Any):
        wrong = LoraConfig(target_modules=["queri"])
        call = lambda: connect(strict_server, model="bert", adapter=wrong)  # noqa: E731
        refused(UnknownTargetModule, "queri", "'bert'", remedy="query", call=call)
        call = upload(transport, torch.ones(SIZE), modules=["encoder.layer.9.attention.self.query"])
        refused(UnknownTargetModule, "encoder.layer.9.attention.self.query", remedy="query", call=call)
        call = upload(transport, torch.ones(SIZE), modules=[MODULE, MODULE])
        refused(UnknownTargetModule, MODULE, "twice", remedy="query", call=call)

    def test_an_unknown_pooling(self, strict_server: StrictServer, transport: Transport, connect: Any):
        call = lambda: connect(strict_server, model="bert", pooling="last")  # noqa: E731
        refused(UnknownReadout, "'last'", remedy="cls, mean, max, none", call=call)
        refused(UnknownReadout, "'last'", remedy="cls, mean, max, none", call=forward(transport, pooling="last"))
        refused(
            UnknownReadout, "'cls'", remedy="last, mean, max, none", call=forward(transport, "llama", pooling="cls")
        )

    def test_a_direction_that_a_trunk_does_not_have(self, transport: Transport):
        """The answer names the part of the path, and no file of the server."""
        with pytest.raises(MalformedMessage) as caught:
            transport.post("/v1/models/bert/trunk/sideways", b"")
        assert "path.direction" in caught.value.message
        assert ".py" not in str(caught.value)

    def test_an_adapter_that_was_never_uploaded(self, transport: Transport):
        refused(UnknownAdapter, "0" * 12, remedy="Upload it", call=forward(transport, adapters=["0" * 64]))
        call = backward(transport, torch.ones(1, 1, 3, HIDDEN), adapters=["0" * 64])
        refused(UnknownAdapter, "0" * 12, remedy="Upload it", call=call)


class TestAdapterShapes:
    @pytest.mark.parametrize("size", [0, 1, SIZE - 1, SIZE + 1, 2 * SIZE])
    def test_weights_that_do_not_fit_their_description(self, size: int, transport: Transport):
        call = upload(transport, torch.ones(size))
        refused(AdapterMismatch, f"{size} weights", str(SIZE), remedy="rank and these target modules", call=call)

    @pytest.mark.parametrize("size", [SIZE, SIZE // 2 - 1, 0])
    def test_other_weights_than_b_alone_over_a_fixed_a(self, size: int, transport: Transport):
        call = upload(transport, torch.ones(size), a_seed="5a" * 32)
        refused(AdapterMismatch, f"{size} weights", str(SIZE // 2), remedy="rank and these target modules", call=call)

    @pytest.mark.parametrize("seed", ["5a" * 31, "5A" * 32, "xy" * 32, 7])
    def test_a_seed_that_is_no_seed(self, seed: Any, transport: Transport):
        spec = LoraSpec.model_construct(kind="lora", modules=[MODULE], rank=4, scaling=1.0, dropout=0.0, a_seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pydantic, about what is sent here
            body = encode(AdapterUpload.model_construct(model="bert", spec=spec), {"weights": torch.ones(SIZE // 2)})
        name = hashlib.sha256(body).hexdigest()
        refused(MalformedMessage, "a_seed", remedy="", call=lambda: transport.put(f"/v1/adapters/{name}", body))

    def test_a_matrix_in_place_of_a_vector(self, transport: Transport):
        refused(InvalidTensor, "'weights'", "(4, 64)", remedy="(any)", call=upload(transport, torch.ones(4, 64)))

    def test_a_rank_above_the_layers_side(self, strict_server: StrictServer, transport: Transport):
        call = upload(transport, torch.ones(SIZE), rank=HIDDEN + 1)
        refused(AdapterMismatch, f"{HIDDEN + 1}", remedy="Lower the rank", call=call)

    def test_a_rank_above_the_servers_limit(self, transport: Transport):
        call = upload(transport, torch.ones(9 * 2 * HIDDEN), rank=9)
        refused(AdapterMismatch, "Rank 9", "limit of 8", remedy="Lower the rank", call=call)

    def test_adapters_that_do_not_fit_each_other(self, transport: Transport):
        upload(transport, torch.ones(SIZE // 2), rank=2)()
        other = Upload.of("bert", LoraSpec(modules=[MODULE], rank=2, scaling=1.0), torch.ones(SIZE // 2)).sha256
        call = forward(transport, adapters=[an_adapter(transport), other])
        refused(AdapterMismatch, "rank", remedy="requests of their own", call=call)

    def test_more_adapters_than_the_server_takes(self, transport: Transport):
        call = forward(transport, adapters=[an_adapter(transport)] * 5)
        refused(AdapterMismatch, "5 adapters", "limit is 4", remedy="several requests", call=call)

    def test_cotangents_that_do_not_fit_the_hidden_states(self, transport: Transport):
        for shape in (
            (1, 2, 3, HIDDEN),
            (1, 1, 4, HIDDEN),
            (1, 1, 3, HIDDEN - 1),
            (1, 3, HIDDEN),
            (1, 1, 3, 5, HIDDEN),
        ):
            call = backward(transport, torch.ones(shape))
            refused(InvalidTensor, "'cotangents'", str(shape), remedy=f"(any, 1, 3, {HIDDEN})", call=call)

    def test_a_cotangent_and_a_seed_for_one(self, transport: Transport):
        noise = NoiseShare(seed="00" * 32, exponent=-20, steps=2**20)
        request = BackwardRequest(adapters=[an_adapter(transport)], pooling="mean", noise=noise)
        body = encode(request, {**batch(3, 5).tensors(), "cotangents": torch.ones(1, 1, 3, HIDDEN)})
        call = lambda: transport.post("/v1/models/bert/backward", body)  # noqa: E731
        refused(InvalidTensor, "both 'cotangents' and a seed", remedy="one of the two", call=call)

    @pytest.mark.parametrize(
        "wrong", [{"version": 1}, {"steps": 0}, {"steps": 2**21}, {"exponent": 61}, {"seed": "short"}]
    )
    def test_noise_of_another_version_or_size(self, wrong: dict[str, Any], transport: Transport):
        noise = NoiseShare.model_construct(**{"version": 2, "seed": "00" * 32, "exponent": 0, "steps": 9, **wrong})
        request = BackwardRequest.model_construct(adapters=[an_adapter(transport)], pooling="mean", noise=noise)
        body = encode(request, batch(3, 5).tensors())
        call = lambda: transport.post("/v1/models/bert/backward", body)  # noqa: E731
        refused(MalformedMessage, "noise", remedy="", call=call)

    def test_no_cotangent_or_too_many(self, transport: Transport):
        refused(InvalidTensor, "'cotangents' is missing", remedy="shape", call=backward(transport, None))
        for count in (0, 17):
            call = backward(transport, torch.ones(count, 1, 3, HIDDEN))
            refused(InvalidTensor, f"{count} cotangents", "1 to 16", remedy="several calls", call=call)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
class TestNonFinite:
    def test_weights(self, bad: float, transport: Transport):
        weights = torch.ones(SIZE)
        weights[7:9] = bad
        refused(NonFiniteTensor, "'weights'", "2 values", remedy="learning rate", call=upload(transport, weights))

    def test_cotangents(self, bad: float, transport: Transport):
        cotangents = torch.ones(1, 1, 3, HIDDEN)
        cotangents[0, 0, 2, 5] = bad
        call = backward(transport, cotangents)
        refused(NonFiniteTensor, "'cotangents'", "1 value", remedy="clip gradients", call=call)

    def test_of_a_users_parameters_and_loss(
        self, bad: float, strict_server: StrictServer, connect: Any, film_sentences: list[str]
    ):
        backbone = connect(strict_server, model="bert", max_length=16)
        hidden = backbone(film_sentences[:2])
        call = lambda: (hidden * bad).sum().backward()  # noqa: E731
        refused(NonFiniteTensor, "'cotangents'", remedy="learning rate", call=call)
        with torch.no_grad():
            next(backbone.parameters())[0, 0] = bad
        call = lambda: backbone(film_sentences[:2])  # noqa: E731
        refused(NonFiniteTensor, "'weights'", remedy="learning rate", call=call)


def test_finite_weights_that_overflow_in_the_model(transport: Transport):
    weights = torch.full((SIZE,), 3e38)
    upload(transport, weights)()
    sha256 = Upload.of("bert", LoraSpec(modules=[MODULE], rank=4, scaling=1.0), weights).sha256
    refused(NonFiniteTensor, "'hidden'", remedy="learning rate", call=forward(transport, adapters=[sha256]))


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
    def test_of_weights(self, dtype: torch.dtype, transport: Transport):
        call = upload(transport, torch.ones(SIZE).to(dtype))
        refused(InvalidTensor, "'weights'", str(dtype), remedy="torch.float32", call=call)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_of_cotangents(self, dtype: torch.dtype, transport: Transport):
        call = backward(transport, torch.ones(1, 1, 3, HIDDEN).to(dtype))
        refused(InvalidTensor, "'cotangents'", str(dtype), remedy="torch.float32", call=call)

    def test_of_tokens(self, transport: Transport):
        good = batch(3, 5)
        for name, tensor, dtype in (
            ("input_ids", good.input_ids.long(), "torch.int64"),
            ("input_ids", good.input_ids.float(), "torch.float32"),
            ("lengths", good.lengths.long(), "torch.int64"),
            ("token_type_ids", torch.zeros(3, 5, dtype=torch.int32), "torch.int32"),
        ):
            call = forward(transport, **{name: tensor})
            refused(InvalidTensor, repr(name), dtype, remedy="Send it as", call=call)

    def test_that_the_format_does_not_know(self, transport: Transport):
        body = encode(ForwardRequest(pooling="mean"), batch(3, 5).tensors()).replace(b'"I32"', b'"C64"')
        call = lambda: transport.post("/v1/models/bert/forward", body)  # noqa: E731
        refused(InvalidTensor, "'C64'", remedy="F32", call=call)


class TestTokensOfTexts:
    def test_missing_or_misshapen_tensors(self, transport: Transport):
        good = batch(3, 5)
        refused(InvalidTensor, "'input_ids' is missing", remedy="(any, any)", call=forward(transport, input_ids=None))
        refused(InvalidTensor, "'lengths' is missing", remedy="(3)", call=forward(transport, lengths=None))
        call = forward(transport, input_ids=good.input_ids[0])
        refused(InvalidTensor, "'input_ids'", "(5,)", remedy="(any, any)", call=call)
        call = forward(transport, lengths=good.lengths[:2])
        refused(InvalidTensor, "'lengths'", "(2,)", remedy="(3)", call=call)
        call = forward(transport, token_type_ids=torch.zeros(3, 4, dtype=torch.uint8))
        refused(InvalidTensor, "'token_type_ids'", "(3, 4)", remedy="(3, 5)", call=call)

    @pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
    def test_an_empty_batch(self, shape: tuple[int, int], transport: Transport):
        ids, lengths = torch.ones(shape, dtype=torch.int32), torch.zeros(shape[0], dtype=torch.int32)
        call = forward(transport, input_ids=ids, lengths=lengths)
        refused(EmptyBatch, str(shape), remedy="at least one example", call=call)

    def test_an_example_without_tokens(self, transport: Transport):
        for bad in (0, -1):
            call = forward(transport, lengths=torch.tensor([5, bad, 2], dtype=torch.int32))
            refused(EmptyBatch, "without tokens", remedy="at least one token", call=call)

    def test_no_texts(self, strict_server: StrictServer, connect: Any):
        call = lambda: connect(strict_server, model="bert", max_length=16)([])  # noqa: E731
        refused(EmptyBatch, "(0, 0)", remedy="at least one example", call=call)

    def test_a_length_beyond_the_batch(self, transport: Transport):
        call = forward(transport, lengths=torch.tensor([5, 6, 2], dtype=torch.int32))
        refused(InvalidTensor, "length of 6", "5 tokens", remedy="at most", call=call)

    @pytest.mark.parametrize("bad", [-1, VOCABULARY, 2**31 - 1])
    def test_a_token_outside_the_vocabulary(self, bad: int, transport: Transport):
        ids = batch(3, 5).input_ids.clone()
        ids[1, 1] = bad
        refused(InvalidTensor, str(bad), str(VOCABULARY), remedy="tokenizer", call=forward(transport, input_ids=ids))

    def test_a_token_type_that_the_model_does_not_know(self, transport: Transport):
        types = torch.full((3, 5), 2, dtype=torch.uint8)
        call = forward(transport, token_type_ids=types)
        refused(InvalidTensor, "token type of 2", remedy="0 to 1", call=call)

    def test_a_sequence_that_is_too_long(self, strict_server: StrictServer, transport: Transport, connect: Any):
        good = batch(1, 33)
        call = forward(transport, input_ids=good.input_ids, lengths=good.lengths)
        refused(SequenceTooLong, "33 tokens", "limit is 32", remedy="Truncate to 32", call=call)
        call = lambda: connect(strict_server, model="bert", max_length=33)  # noqa: E731
        refused(SequenceTooLong, "33", "32", remedy="Lower max_length", call=call)

    def test_a_batch_with_too_many_tokens_in_all(self, transport: Transport):
        good = batch(65, 32)
        call = forward(transport, input_ids=good.input_ids, lengths=good.lengths)
        refused(SequenceTooLong, "65 examples of 32 tokens", "limit is 2048", remedy="smaller batch", call=call)
        good = batch(22, 32)
        call = forward(transport, adapters=[an_adapter(transport)] * 3, input_ids=good.input_ids, lengths=good.lengths)
        refused(SequenceTooLong, "under 3 adapters", "2112", remedy="smaller batch", call=call)


class TestBodies:
    ROUTES = ("/v1/models/bert/forward", "/v1/models/bert/backward")

    @pytest.mark.parametrize("path", ROUTES)
    @pytest.mark.parametrize("claimed", [2**63, 2**20 + 1, 100_000, 5])
    def test_a_header_that_lies_about_its_length(self, path: str, claimed: int, transport: Transport):
        body = claimed.to_bytes(8, "little") + encode(ForwardRequest(pooling="mean"), batch(3, 5).tensors())[8:]
        refused(MalformedMessage, remedy="", call=lambda: transport.post(path, body))

    @pytest.mark.parametrize("path", ROUTES)
    @pytest.mark.parametrize("body", [b"", b"x", b"{}", b"\x00" * 100, b"\xff" * 100, b"PK\x03\x04" * 50, b'{"a": 1}'])
    def test_bytes_that_are_no_message(self, path: str, body: bytes, transport: Transport):
        refused(MalformedMessage, remedy="", call=lambda: transport.post(path, body))
        refused(MalformedMessage, remedy="", call=lambda: transport.put("/v1/adapters/" + "0" * 64, body))

    def test_a_body_over_the_limit(self, transport: Transport):
        call = lambda: transport.post("/v1/models/bert/forward", bytes(2**20 + 1))  # noqa: E731
        refused(BodyTooLarge, str(2**20), str(2**20 + 1), remedy="smaller batch", call=call)

    def test_a_body_over_the_limit_that_does_not_say_so(self, strict_server: StrictServer):
        """Chunked, without a declared length."""
        with strict_server.client() as client:
            response = client.post("/v1/models/bert/forward", content=(bytes(2**16) for _ in range(100)))
        assert response.status_code == 413
        assert str(2**20) in response.json()["detail"]

    def test_another_message_than_the_route_takes(self, transport: Transport):
        body = encode(AdapterUpload(model="bert", spec=LoraSpec(modules=[MODULE], rank=1, scaling=1.0)))
        call = lambda: transport.post("/v1/models/bert/forward", body)  # noqa: E731
        refused(MalformedMessage, "ForwardRequest", remedy="field", call=call)

    def test_another_version(self, transport: Transport):
        body = encode(ForwardRequest(pooling="mean"), batch(3, 5).tensors())
        old = body.replace(b'"blindtune": "1"', b'"blindtune": "7"')
        assert old != body
        call = lambda: transport.post("/v1/models/bert/forward", old)  # noqa: E731
        refused(UnsupportedVersion, "'7'", remedy="matching versions", call=call)

    def test_an_adapter_under_a_hash_that_is_not_its_own(self, transport: Transport):
        sent = Upload.of("bert", LoraSpec(modules=[MODULE], rank=4, scaling=1.0), torch.ones(SIZE))
        for name in ("0" * 64, sent.sha256.upper(), sent.sha256[:-1], "x"):
            call = lambda name=name: transport.put(f"/v1/adapters/{name}", sent.body)  # noqa: E731
            refused(MalformedMessage, "SHA-256", remedy="unchanged", call=call)

    def test_a_body_whose_sender_goes_away_in_the_middle(self, strict_server: StrictServer):
        host, port = "127.0.0.1", strict_server.server.port
        head = (
            f"POST /v1/models/bert/forward HTTP/1.1\r\nhost: {host}\r\ncontent-length: 100000\r\n"
            f"authorization: Bearer {strict_server.tokens['bob']}\r\n\r\n"
        )
        plain = socket.create_connection((host, port))
        with strict_server.trust.wrap_socket(plain, server_hostname=host) as connection:
            connection.sendall(head.encode() + b"x" * 1000)
        assert strict_server.transport("bob").get("/healthz") == {"status": "ok"}

    @pytest.mark.parametrize("length", ["-1", "1e3", "abc", "99999999999999999999"])
    def test_a_declared_length_that_is_none(self, length: str, strict_server: StrictServer):
        plain = socket.create_connection(("127.0.0.1", strict_server.server.port))
        with strict_server.trust.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
            head = f"POST /v1/models/bert/forward HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n"
            token = f"authorization: Bearer {strict_server.tokens['bob']}\r\n\r\n"
            connection.sendall((head + token).encode())
            status = connection.recv(100).split()[1]
        assert status in (b"400", b"413")


class TestNothingIsLost:
    def test_a_refused_step_leaves_the_users_weights_and_the_next_step_works(
        self, strict_server: StrictServer, connect: Any, film_sentences: list[str]
    ):
        backbone = connect(strict_server, model="bert", max_length=16)
        optimizer = torch.optim.Adam(backbone.parameters(), lr=0.01)

        def step(texts: list[str], factor: float = 1.0) -> None:
            optimizer.zero_grad()
            (backbone(texts) * factor).square().sum().backward()
            optimizer.step()

        step(film_sentences[:3])
        before = [parameter.detach().clone() for parameter in backbone.parameters()]
        for texts, factor in (([], 1.0), (film_sentences[:3], math.inf)):
            with pytest.raises(RequestError):
                step(texts, factor)
        assert all(torch.equal(a, b) for a, b in zip(backbone.parameters(), before, strict=True))
        step(film_sentences[:3])
        assert not torch.equal(next(backbone.parameters()), before[0])

    def test_a_refused_backward_call_costs_nothing_but_the_kept_graph(
        self, transport: Transport, tiny_backbone: Callable[..., FrozenBackbone]
    ):
        operator = Operator(transport, "bert")
        _, (adapter,) = random_adapters(tiny_backbone("bert"), LoraConfig(r=4), 1)
        sent = [Upload.of("bert", adapter.layout.spec, adapter.vector().detach())]
        hidden = operator.forward(batch(3, 5), sent, Readout(pooling="mean"), None)
        assert hidden is not None
        good = torch.randn(1, *hidden.shape)
        expected = operator.backward(batch(3, 5), sent, Readout(pooling="mean"), None, good)
        operator.forward(batch(3, 5), sent, Readout(pooling="mean"), None)
        with pytest.raises(NonFiniteTensor):
            operator.backward(batch(3, 5), sent, Readout(pooling="mean"), None, good / 0)
        assert torch.equal(operator.backward(batch(3, 5), sent, Readout(pooling="mean"), None, good), expected)


def test_every_refusal_is_a_problem_document(strict_server: StrictServer):
    """Also those that our own client would never provoke."""
    with strict_server.client("bob") as client:
        for method, path in (
            ("GET", "/nothing"),
            ("DELETE", "/v1/models"),
            ("PUT", "/v1/adapters/x"),
            ("POST", "/v1/models/bert/forward"),
        ):
            response = client.request(method, path, content=b"x")
            document = json.loads(response.content)
            assert response.headers["content-type"] == "application/problem+json"
            assert document["status"] == response.status_code >= 400
            assert re.match("urn:blindtune:problem:", document["type"])
            assert document["detail"]


def test_an_adapter_object_of_another_model_is_refused_before_anything_is_sent(
    strict_server: StrictServer, connect: Any, tiny_backbone: Callable[..., FrozenBackbone], film_sentences: list[str]
):
    """The description names layers that this model doesn't have."""
    from blindtune.wire import Limits

    backbone = connect(strict_server, model="bert", max_length=16)
    info = tiny_backbone("llama").info("bert", Limits())
    backbone.adapters[0] = LoraAdapter(LoraConfig(target_modules=["q_proj"]), info)
    call = lambda: backbone(film_sentences[:2])  # noqa: E731
    refused(UnknownTargetModule, "layers.0.self_attn.q_proj", remedy="query", call=call)
