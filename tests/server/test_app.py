"""The HTTP API: what each route answers, to whom, and what is counted and logged of it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from peft import LoraConfig
from starlette.testclient import TestClient
from torch import Tensor

from blindtune.client import Upload
from blindtune.errors import PROBLEM_PREFIX, TooBusy
from blindtune.lattice import Lattice, expand_noise
from blindtune.models import FrozenBackbone, load_backbone
from blindtune.server import ServerSettings, create_app
from blindtune.server.host import Host
from blindtune.wire import (
    MEDIA_TYPE,
    BackwardRequest,
    BackwardResponse,
    ForwardRequest,
    ForwardResponse,
    Limits,
    ModelInfo,
    NoiseShare,
    Pooling,
    decode,
    encode,
)
from tests.conftest import Server, StrictServer
from tests.models.test_lora import batch, random_adapters
from tests.tiny import HIDDEN

LoadTiny = Callable[..., FrozenBackbone]


def problem(response: httpx2.Response, slug: str, status: int) -> dict[str, Any]:
    """The problem document of a refusal, which must be of this type."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert (document["type"], document["status"]) == (PROBLEM_PREFIX + slug, status)
    assert document["detail"]
    return document


def uploads(backbone: FrozenBackbone, count: int, model: str = "bert", **options: Any) -> tuple[list[Upload], Tensor]:
    _, adapters = random_adapters(backbone, LoraConfig(**{"r": 4, "target_modules": ["query"], **options}), count)
    bodies = [Upload.of(model, adapter.layout.spec, adapter.vector().detach()) for adapter in adapters]
    return bodies, torch.stack([adapter.vector().detach() for adapter in adapters])


class TestDescriptions:
    def test_the_list_names_every_hosted_model(self, http: httpx2.Client, tiny_models: dict[str, Path]):
        listed = http.get("/v1/models").json()
        assert listed["models"] == list(tiny_models)
        assert listed["api_version"] == 1
        assert re.fullmatch("[0-9a-f]{32}", listed["operator_id"])

    def test_servers_have_ids_of_their_own(self, two_servers: list[Server]):
        ids = [httpx2.get(server.url + "/v1/models").json()["operator_id"] for server in two_servers]
        assert len(set(ids)) == 2

    def test_a_description_is_what_the_model_says_of_itself(self, http: httpx2.Client, tiny_backbone: LoadTiny):
        described = ModelInfo.model_validate(http.get("/v1/models/t5").json())
        assert described == tiny_backbone("t5").info("t5", described.limits)

    def test_the_tokenizer_is_the_models(self, http: httpx2.Client, tiny_backbone: LoadTiny):
        file = http.get("/v1/models/llama/tokenizer").json()
        assert file["tokenizer"] == tiny_backbone("llama").tokenizer
        assert file["sha256"] == hashlib.sha256(file["tokenizer"].encode()).hexdigest()

    @pytest.mark.parametrize("path", ["/v1/models/gpt5", "/v1/models/gpt5/tokenizer"])
    def test_an_unknown_model_is_refused_with_what_there_is(self, path: str, http: httpx2.Client):
        document = problem(http.get(path), "unknown-model", 404)
        assert "'gpt5'" in document["detail"]
        assert "roberta" in document["remedy"]

    @pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v2/models", 404), ("POST", "/v1/models", 405)])
    def test_an_unknown_route_is_a_problem_document_too(self, method: str, path: str, status: int, http: httpx2.Client):
        problem(http.request(method, path), f"http-{status}", status)

    @pytest.mark.parametrize("path", ["/healthz", "/readyz"])
    def test_health_is_json(self, path: str, http: httpx2.Client):
        assert http.get(path).json() == {"status": "ok"}


class TestPasses:
    def test_forward_and_backward_equal_the_model_in_this_process(self, http: httpx2.Client, tiny_backbone: LoadTiny):
        backbone = tiny_backbone("bert")
        bodies, weights = uploads(backbone, 2)
        for upload in bodies:
            receipt = http.put(f"/v1/adapters/{upload.sha256}", content=upload.body).json()
            assert receipt == {"sha256": upload.sha256, "parameters": weights.shape[1]}
        tokens, hashes = batch(4, 6), [upload.sha256 for upload in bodies]
        leaf = weights.clone().requires_grad_()
        _, (adapter,) = random_adapters(backbone, LoraConfig(r=4, target_modules=["query"]), 1)
        expected = backbone.forward(tokens, "mean", adapter.layout, leaf)
        cotangents = torch.randn(2, *expected.shape)
        expected_gradients = [torch.autograd.grad(expected, leaf, c, retain_graph=True)[0] for c in cotangents]

        answer = http.post(
            "/v1/models/bert/forward",
            content=encode(ForwardRequest(adapters=hashes, pooling="mean", retain=True), tokens.tensors()),
        )
        assert answer.headers["content-type"] == MEDIA_TYPE
        message, tensors = decode(answer.content, ForwardResponse)
        assert message.fingerprint == backbone.fingerprint
        assert torch.equal(tensors["hidden"], expected.detach())

        request = BackwardRequest(adapters=hashes, pooling="mean")
        body = encode(request, {**tokens.tensors(), "cotangents": cotangents})
        for retained in (True, False):
            reply, tensors = decode(http.post("/v1/models/bert/backward", content=body).content, BackwardResponse)
            assert reply.retained is retained
            assert torch.equal(tensors["gradients"], torch.stack(expected_gradients))

    @pytest.mark.parametrize("pooling", ["mean", "none"])
    def test_a_seed_stands_for_the_noise_that_it_expands_to(
        self, http: httpx2.Client, tiny_backbone: LoadTiny, pooling: Pooling
    ):
        bodies, _ = uploads(tiny_backbone("bert"), 2)
        for upload in bodies:
            http.put(f"/v1/adapters/{upload.sha256}", content=upload.body)
        tokens, hashes = batch(4, 6), [upload.sha256 for upload in bodies]
        shape = (1, 2, 4, HIDDEN) if pooling == "mean" else (1, 2, 4, 6, HIDDEN)
        noise = NoiseShare(seed="ab" * 32, exponent=-15, steps=10**6)
        as_seed = encode(BackwardRequest(adapters=hashes, pooling=pooling, noise=noise), tokens.tensors())
        cotangents = expand_noise(bytes.fromhex(noise.seed), shape, Lattice(noise.exponent, noise.steps))
        whole = BackwardRequest(adapters=hashes, pooling=pooling)
        as_tensor = encode(whole, {**tokens.tensors(), "cotangents": cotangents})
        answers = [
            decode(http.post("/v1/models/bert/backward", content=body).content, BackwardResponse)[1]["gradients"]
            for body in (as_seed, as_tensor)
        ]
        assert torch.equal(*answers)
        assert len(as_tensor) - len(as_seed) > cotangents.nbytes - 300

    def test_without_adapters_the_frozen_model_answers(self, http: httpx2.Client, tiny_backbone: LoadTiny):
        tokens = batch(3, 5)
        answer = http.post("/v1/models/opt/forward", content=encode(ForwardRequest(pooling="last"), tokens.tensors()))
        _, tensors = decode(answer.content, ForwardResponse)
        assert torch.equal(tensors["hidden"], tiny_backbone("opt").forward(tokens, "last"))

    def test_hidden_states_that_nobody_wants_are_computed_but_not_sent(
        self, http: httpx2.Client, tiny_backbone: LoadTiny
    ):
        (upload,), _ = uploads(tiny_backbone("bert"), 1)
        http.put(f"/v1/adapters/{upload.sha256}", content=upload.body)
        tokens = batch(4, 6, seed=8)
        request = ForwardRequest(adapters=[upload.sha256], pooling="mean", retain=True, return_hidden=False)
        answer = http.post("/v1/models/bert/forward", content=encode(request, tokens.tensors()))
        assert decode(answer.content, ForwardResponse)[1] == {}
        backward = BackwardRequest(adapters=[upload.sha256], pooling="mean")
        body = encode(backward, {**tokens.tensors(), "cotangents": torch.ones(1, 1, 4, HIDDEN)})
        assert decode(http.post("/v1/models/bert/backward", content=body).content, BackwardResponse)[0].retained

    def test_one_adapter_may_be_uploaded_twice(self, http: httpx2.Client, tiny_backbone: LoadTiny):
        (upload,), _ = uploads(tiny_backbone("bert"), 1)
        answers = [http.put(f"/v1/adapters/{upload.sha256}", content=upload.body) for _ in range(2)]
        assert answers[0].json() == answers[1].json()

    def test_requests_for_several_models_at_the_same_time_get_their_own_answers(
        self, http: httpx2.Client, tiny_backbone: LoadTiny
    ):
        names = {"bert": "cls", "roberta": "mean", "llama": "last", "t5": "first"}
        tokens = batch(3, 5)
        expected = {n: tiny_backbone(n).forward(tokens, p) for n, p in names.items()}  # type: ignore[arg-type]

        def ask(name: str) -> bool:
            body = encode(ForwardRequest.model_validate({"pooling": names[name]}), tokens.tensors())
            answer = http.post(f"/v1/models/{name}/forward", content=body)
            return torch.equal(decode(answer.content, ForwardResponse)[1]["hidden"], expected[name])

        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(ask, [*names] * 8))


class TestWhoMayAsk:
    ROUTES = (
        ("GET", "/v1/models"),
        ("GET", "/v1/models/bert"),
        ("GET", "/v1/models/bert/tokenizer"),
        ("GET", "/v1/models/no-such-model"),
        ("PUT", "/v1/adapters/" + "0" * 64),
        ("POST", "/v1/models/bert/forward"),
        ("POST", "/v1/models/bert/backward"),
    )

    @pytest.mark.parametrize(("method", "path"), ROUTES)
    def test_every_route_of_the_api_wants_a_token(self, method: str, path: str, strict_server: StrictServer):
        with strict_server.client(None) as client:
            for headers in ({}, {"authorization": "Bearer wrong"}):
                response = client.request(method, path, headers=headers, content=b"x" if method != "GET" else None)
                problem(response, "unauthenticated", 401)
                assert response.headers["www-authenticate"] == "Bearer"

    @pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
    def test_health_and_metrics_are_open(self, path: str, strict_server: StrictServer):
        with strict_server.client(None) as client:
            assert client.get(path).status_code == 200

    def test_one_tenants_adapter_is_unknown_to_another(self, strict_server: StrictServer, tiny_backbone: LoadTiny):
        (upload,), _ = uploads(tiny_backbone("bert"), 1)
        body = encode(ForwardRequest(adapters=[upload.sha256], pooling="mean"), batch(2, 3).tensors())
        with strict_server.client("ann") as ann, strict_server.client("bob") as bob:
            ann.put(f"/v1/adapters/{upload.sha256}", content=upload.body).raise_for_status()
            assert ann.post("/v1/models/bert/forward", content=body).status_code == 200
            problem(bob.post("/v1/models/bert/forward", content=body), "unknown-adapter", 404)

    def test_an_adapter_for_one_model_is_unknown_to_another(self, http: httpx2.Client, tiny_backbone: LoadTiny):
        (upload,), _ = uploads(tiny_backbone("bert"), 1)
        http.put(f"/v1/adapters/{upload.sha256}", content=upload.body).raise_for_status()
        body = encode(ForwardRequest(adapters=[upload.sha256], pooling="mean"), batch(2, 3).tensors())
        problem(http.post("/v1/models/roberta/forward", content=body), "unknown-adapter", 404)


class TestLogs:
    def test_a_line_tells_route_status_and_sizes_and_nothing_that_was_sent(
        self, strict_server: StrictServer, connect: Callable[..., Any], film_sentences: list[str]
    ):
        marker = "zanzibarquokka"
        backbone = connect(strict_server, model="bert", max_length=16)
        backbone([f"{marker} {film_sentences[0]}"]).sum().backward()
        with strict_server.client() as client:
            client.post(f"/v1/models/{marker}/forward", content=marker.encode())
            client.post(
                "/v1/models/bert/forward", content=encode(ForwardRequest(pooling="mean"), {marker: torch.ones(1)})
            )
            client.put(f"/v1/adapters/{marker}", content=marker.encode() * 50)
            client.get("/v1/models", headers={"authorization": f"Bearer {marker}"})
            client.get(f"/v1/models?text={marker}")
        log = strict_server.server.log.read_text()
        assert marker not in log
        assert strict_server.tokens["ann"] not in log
        lines = [line for line in map(json.loads, log.splitlines()) if line.get("logger") is None]
        assert {"/v1/adapters/{sha256}", "/v1/models/{model}/forward", "/v1/models/{model}/backward"} <= {
            line.get("route") for line in lines
        }
        known = {"event", "method", "route", "status", "ms", "bytes_in", "bytes_out", "level", "timestamp"}
        assert all(set(line) == known for line in lines)

    def test_what_libraries_say_is_a_line_of_json_too(self, tiny_server: Server):
        with socket.create_connection(("127.0.0.1", tiny_server.port)) as connection:
            connection.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
            connection.recv(1000)
        told = [json.loads(line) for line in tiny_server.log.read_text().splitlines() if "Invalid HTTP" in line]
        assert told
        assert all(line["logger"] == "uvicorn.error" and line["level"] == "warning" for line in told)


class TestFaults:
    """A bug on the server is a problem document for one client and a trace in the log, not the end of the process."""

    @pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the in-process test client
    def test_of_the_model_is_told_without_details_and_the_next_request_works(
        self, tiny_models: dict[str, Path], capfd: pytest.CaptureFixture[str]
    ):
        backbone = load_backbone(str(tiny_models["bert"]))
        body = encode(ForwardRequest(pooling="mean"), batch(2, 3).tensors())
        with TestClient(create_app({"bert": backbone}), raise_server_exceptions=False) as client:
            whole, backbone.model.encoder = backbone.model.encoder, None  # type: ignore[assignment]
            response = client.post("/v1/models/bert/forward", content=body)
            assert response.status_code == 500
            document = response.json()
            assert document["type"] == PROBLEM_PREFIX + "server-fault"
            assert "NoneType" not in document["detail"]
            backbone.model.encoder = whole
            assert client.post("/v1/models/bert/forward", content=body).status_code == 200
            assert 'status="500"} 1.0' in client.get("/metrics").text


class TestQueue:
    def test_a_full_queue_asks_to_come_back_and_takes_requests_again_once_it_is_empty(self, tiny_backbone: LoadTiny):
        host = Host({"bert": tiny_backbone("bert")}, ServerSettings(max_queue=2))
        begun, go_on = threading.Event(), threading.Event()

        def work() -> bytes:
            begun.set()
            go_on.wait(30)
            return b"done"

        async def queued() -> bytes:
            with host.queue_slot():
                return await host.on_engine("bert", work)

        async def scene() -> None:
            waiting = [asyncio.create_task(queued()) for _ in range(2)]
            await asyncio.to_thread(begun.wait, 30)
            with pytest.raises(TooBusy, match="2 requests are waiting"):
                await queued()
            go_on.set()
            assert await asyncio.gather(*waiting) == [b"done", b"done"]
            assert await queued() == b"done"

        asyncio.run(scene())
        host.close()

    def test_too_busy_tells_when_to_come_back(self, tiny_backbone: LoadTiny):
        app = create_app({"bert": tiny_backbone("bert")}, ServerSettings(max_queue=0))
        with TestClient(app) as client:
            body = encode(ForwardRequest(pooling="mean"), batch(2, 3).tensors())
            response = client.post("/v1/models/bert/forward", content=body)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert response.json()["type"] == PROBLEM_PREFIX + "too-busy"


class TestNamesWithAnOwner:
    def test_a_hub_name_is_reached_on_every_route(self, tiny_backbone: LoadTiny):
        name = "owner/tiny-bert"
        with TestClient(create_app({name: tiny_backbone("bert")})) as client:
            assert client.get(f"/v1/models/{name}").json()["name"] == name
            assert client.get(f"/v1/models/{name}/tokenizer").status_code == 200
            body = encode(ForwardRequest(pooling="mean"), batch(2, 3).tensors())
            assert client.post(f"/v1/models/{name}/forward", content=body).status_code == 200


class TestAnswerLimit:
    def test_gradients_over_the_limit_are_refused_before_they_are_computed(self, tiny_backbone: LoadTiny):
        backbone = tiny_backbone("bert")
        settings = ServerSettings(limits=Limits(max_answer_bytes=1000))
        (upload,), _ = uploads(backbone, 1)
        with TestClient(create_app({"bert": backbone}, settings)) as client:
            client.put(f"/v1/adapters/{upload.sha256}", content=upload.body)
            request = BackwardRequest(adapters=[upload.sha256], pooling="mean")
            cotangents = torch.ones(1, 1, 2, HIDDEN)
            body = encode(request, {**batch(2, 3).tensors(), "cotangents": cotangents})
            response = client.post("/v1/models/bert/backward", content=body)
        assert response.status_code == 413
        assert "the limit is 1000" in response.json()["detail"]
