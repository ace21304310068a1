"""What is counted: requests, bytes, tokens and graphs, under a fixed set of names."""

from __future__ import annotations

from collections.abc import Callable

import httpx2
import torch

from blindtune.models import FrozenBackbone
from blindtune.wire import BackwardRequest, ForwardRequest, encode
from tests.conftest import Server
from tests.models.test_lora import batch
from tests.server.test_app import uploads
from tests.tiny import HIDDEN

LoadTiny = Callable[..., FrozenBackbone]


class TestMetrics:
    def test_requests_bytes_tokens_and_graphs_are_counted(
        self, http: httpx2.Client, tiny_server: Server, tiny_backbone: LoadTiny
    ):
        bodies, _ = uploads(tiny_backbone("bert"), 2, r=3)
        hashes, tokens = [upload.sha256 for upload in bodies], batch(4, 6, seed=5)
        before = tiny_server.metrics()
        for upload in bodies:
            http.put(f"/v1/adapters/{upload.sha256}", content=upload.body)
        forward = encode(ForwardRequest(adapters=hashes, pooling="mean", retain=True), tokens.tensors())
        answer = http.post("/v1/models/bert/forward", content=forward)
        cotangents = {"cotangents": torch.ones(3, 2, 4, HIDDEN)}
        backward = encode(BackwardRequest(adapters=hashes, pooling="mean"), {**tokens.tensors(), **cotangents})
        for _ in range(2):
            http.post("/v1/models/bert/backward", content=backward)
        http.post("/v1/models/bert/backward", content=b"")
        after = tiny_server.metrics()

        def grown(name: str) -> float:
            return after.get(name, 0) - before.get(name, 0)

        route = 'route="/v1/models/{model}/%s"'
        assert grown('blindtune_requests_total{route="/v1/adapters/{sha256}",status="200"}') == 2
        assert grown('blindtune_requests_total{%s,status="200"}' % (route % "forward")) == 1
        assert grown('blindtune_requests_total{%s,status="200"}' % (route % "backward")) == 2
        assert grown('blindtune_requests_total{%s,status="400"}' % (route % "backward")) == 1
        assert grown("blindtune_received_bytes_total{%s}" % (route % "forward")) == len(forward)
        assert grown("blindtune_sent_bytes_total{%s}" % (route % "forward")) == len(answer.content)
        assert grown('blindtune_tokens_total{kind="forward"}') == 4 * 6 * 2
        assert grown('blindtune_tokens_total{kind="backward"}') == 2 * 4 * 6 * 2 * 3
        assert grown('blindtune_graphs_total{result="retained"}') == 1
        assert grown('blindtune_graphs_total{result="recomputed"}') == 1
        assert grown("blindtune_adapter_bytes") == sum(4 * 3 * (2 * HIDDEN) * 3 for _ in bodies)
        assert after["blindtune_queue"] == 0

    def test_unknown_paths_do_not_make_new_series(self, http: httpx2.Client, tiny_server: Server):
        for index in range(3):
            http.get(f"/made-up-{index}")
        assert not any("made-up" in name for name in tiny_server.metrics())
