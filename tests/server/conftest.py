"""A server that recorded, worked, and was told to stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx2
import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from blindtune.client import Operator, Transport, Upload
from blindtune.models import FrozenBackbone, LoraAdapter, Tokens
from blindtune.wire import ForwardRequest, ModelInfo, Readout, Transcript, encode
from tests.conftest import Server, StartServer
from tests.models.test_lora import batch


@pytest.fixture
def http(tiny_server: Server) -> Generator[httpx2.Client]:
    with httpx2.Client(base_url=tiny_server.url, timeout=60) as client:
        yield client


@dataclass
class Ended:
    """A recording server that was told to stop while it worked, and what its client had sent and received."""

    server: Server
    status: int
    transcript: Transcript
    info: ModelInfo
    tokens: Tokens
    adapters: list[LoraAdapter]
    uploads: list[Upload]
    hidden: Tensor
    frozen: Tensor
    cotangents: Tensor
    last_tokens: Tokens
    last_answer: httpx2.Response


def post_while_stopping(server: Server, body: bytes) -> tuple[httpx2.Response, int]:
    """Sends SIGTERM while the server works on this request; its answer, and the exit status of the server."""
    with ThreadPoolExecutor(1) as thread, httpx2.Client(base_url=server.url, timeout=120) as http:
        answer = thread.submit(http.post, "/v1/models/minilm/forward", content=body)
        while "blindtune_queue 1.0" not in httpx2.get(server.url + "/metrics").text:
            assert not answer.done(), "the request must still run when the signal comes"
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        return answer.result(), server.stop()


@pytest.fixture(scope="session")
def ended(
    start_server: StartServer, minilm: FrozenBackbone, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Ended]:
    folder = tmp_path_factory.mktemp("record")
    with start_server("minilm", record=folder) as server:
        transport = Transport(server.url)
        operator = Operator(transport, None)
        generator = torch.Generator().manual_seed(3)
        config = LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
        adapters = [LoraAdapter(config, operator.info, generator=generator) for _ in range(2)]
        uploads = [Upload.of("minilm", a.layout.spec, a.vector().detach()) for a in adapters]
        tokens = Tokens(batch(3, 7).input_ids, batch(3, 7).lengths, torch.zeros(3, 7, dtype=torch.uint8))
        hidden = operator.forward(tokens, uploads, Readout(pooling="mean"), 9)
        frozen = operator.forward(tokens, [], Readout(pooling="cls"), None)
        cotangents = torch.randn(2, *hidden.shape)
        operator.backward(tokens, uploads, Readout(pooling="mean"), 9, cotangents)
        operator.compute(tokens, uploads, Readout(pooling="mean"), 9)
        last_tokens = batch(64, 128)  # seconds, and on a busy machine far from the half minute that a server waits
        body = encode(ForwardRequest(pooling="mean"), last_tokens.tensors())
        transport.close()
        answer, status = post_while_stopping(server, body)
        yield Ended(
            server, status, Transcript(folder), operator.info, tokens, adapters, uploads, hidden, frozen, cotangents,
            last_tokens, answer,
        )  # fmt: skip
