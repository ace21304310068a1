"""Memory that runs out costs one request an answer, and caches first."""

from __future__ import annotations

import resource
from pathlib import Path

import httpx2
import pytest
import torch

from blindtune.client import Upload
from blindtune.errors import OutOfMemory
from blindtune.models import FrozenBackbone, Tokens
from blindtune.server.memory import ran_out, with_room
from blindtune.wire import BackwardRequest, BackwardResponse, ForwardRequest, ForwardResponse, decode, encode
from tests.conftest import Server, StartServer
from tests.models.test_lora import batch
from tests.server.test_app import LoadTiny, problem, uploads
from tests.tiny import HIDDEN

MEGABYTE = 2**20
ROWS, LENGTH = 16_000, 16
PROC = Path("/proc/self/statm")
limited = pytest.mark.skipif(not PROC.exists(), reason="needs Linux to limit a process's memory")


def limit(server: Server, more: int) -> None:
    """Lets a server have so many more bytes of address space than it has."""
    assert server.process.process.pid is not None
    pid = server.process.process.pid
    pages = int((Path("/proc") / str(pid) / "statm").read_text().split()[0])
    most = pages * resource.getpagesize() + more
    _, hard = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (most, hard))


def forward(http: httpx2.Client, tokens: Tokens, upload: Upload, *, retain: bool = False) -> httpx2.Response:
    request = ForwardRequest(adapters=[upload.sha256], pooling="mean", retain=retain)
    return http.post("/v1/models/bert/forward", content=encode(request, tokens.tensors()))


@limited
class TestServer:
    def test_a_request_that_does_not_fit_is_refused_and_the_next_is_answered(
        self, start_server: StartServer, tiny_models: dict[str, Path], tiny_backbone: LoadTiny
    ):
        with (
            start_server(f"bert={tiny_models['bert']}", max_tokens=10**8) as server,
            httpx2.Client(base_url=server.url, timeout=120) as http,
        ):
            (upload,), _ = uploads(tiny_backbone("bert"), 1)
            http.put(f"/v1/adapters/{upload.sha256}", content=upload.body)
            few = batch(4, 6)
            before = forward(http, few, upload)
            limit(server, 256 * MEGABYTE)
            document = problem(forward(http, batch(10 * ROWS, LENGTH), upload), "out-of-memory", 507)
            assert "smaller batch" in document["remedy"]
            assert forward(http, few, upload).content == before.content

    def test_retained_graphs_make_room(
        self, start_server: StartServer, tiny_models: dict[str, Path], tiny_backbone: LoadTiny
    ):
        backbone: FrozenBackbone = tiny_backbone("bert")
        with (
            start_server(f"bert={tiny_models['bert']}", max_tokens=10**8) as server,
            httpx2.Client(base_url=server.url, timeout=120) as http,
        ):
            (upload,), weights = uploads(backbone, 1)
            http.put(f"/v1/adapters/{upload.sha256}", content=upload.body)
            kept = batch(ROWS, LENGTH)
            hidden = decode(forward(http, kept, upload, retain=True).content, ForwardResponse)[1]["hidden"]
            held = server.metrics()["blindtune_graph_bytes"]
            assert held > 300 * MEGABYTE
            limit(server, 48 * MEGABYTE)
            answer = forward(http, batch(ROWS, LENGTH, seed=1), upload)
            assert answer.status_code == 200, answer.text
            assert server.metrics()["blindtune_graph_bytes"] == 0
            request = BackwardRequest(adapters=[upload.sha256], pooling="mean")
            cotangents = torch.zeros(1, *hidden.shape)
            cotangents[0, 0, 0] = 1.0
            assert hidden.shape == (1, ROWS, HIDDEN)
            limit(server, 4096 * MEGABYTE)
            body = encode(request, {**kept.tensors(), "cotangents": cotangents})
            told, tensors = decode(http.post("/v1/models/bert/backward", content=body).content, BackwardResponse)
            assert not told.retained
            assert tensors["gradients"].shape == (1, 1, weights.shape[1])


class TestWithRoom:
    @pytest.mark.parametrize(
        "words", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"]
    )
    def test_work_that_fits_once_there_is_room_is_done(self, words: str):
        kept = ["graph"]

        def work() -> str:
            if kept:
                raise RuntimeError(words)
            return "done"

        assert with_room(work, kept.clear) == "done"

    def test_an_error_of_another_kind_stays_what_it_is(self):
        emptied: list[int] = []

        def broken() -> None:
            raise RuntimeError("sizes don't match")

        with pytest.raises(RuntimeError, match="sizes"):
            with_room(broken, lambda: emptied.append(1))
        assert not emptied

    def test_torch_says_it_in_words_that_are_known(self):
        with pytest.raises(RuntimeError) as found:
            torch.empty(2**60, dtype=torch.uint8)
        assert ran_out(found.value)
        with pytest.raises(OutOfMemory, match="not enough memory"):
            with_room(lambda: torch.empty(2**60, dtype=torch.uint8), lambda: None)
