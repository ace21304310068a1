"""Bytes on the wire in one step, counted at the socket by a relay, against the raw tensors that must travel."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

from benchmarks.common import BATCH, sentences, servers, write
from blindtune.cli.options import make_lora_config
from blindtune.client import Backbone
from blindtune.data import Examples
from blindtune.labels import P3EFT, LinearHead, LoRA, PaddedLoRA, PrivateModel
from blindtune.labels.trainer import TrainConfig, Trainer


class Relay:
    """A TCP relay on loopback that counts every byte in both directions, headers included."""

    def __init__(self, port: int) -> None:
        self.bytes = 0
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(("127.0.0.1", self._target))
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        while data := source.recv(65536):
            self.bytes += len(data)
            sink.sendall(data)
        sink.close()


METHODS: dict[str, Callable[[], Any]] = {"LoRA": LoRA, "P3EFT": P3EFT, "padded LoRA": PaddedLoRA}


def measure(urls: list[str], texts: list[str], labels: list[int], name: str) -> dict[str, float]:
    """The second of two steps (connections are open): socket bytes against raw tensors."""
    relays = [Relay(int(url.rsplit(":", 1)[1])) for url in urls]
    backbone = Backbone([relay.url for relay in relays], max_length=48, num_adapters=0)
    method = METHODS[name]()
    rank = method.default_rank
    backbone.adapter_config = make_lora_config(backbone.info, rank=rank, alpha=2 * rank, targets=None, layers="upper")
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), method)
    trainer = Trainer(model, Examples(list(texts), labels, ["0", "1"]), TrainConfig(steps=2, batch_size=len(texts)))
    trainer.prepare()
    steps = trainer.steps()
    next(steps)
    before = sum(relay.bytes for relay in relays)
    next(steps)
    sent = sum(relay.bytes for relay in relays) - before
    rows = backbone.rows(texts)
    adapters = backbone.lora_adapters()
    weights = sum(adapter.layout.size for adapter in adapters) * 4
    hidden = len(rows) * backbone.hidden_size * 4
    tokens = sum(tensor.nbytes for tensor in backbone.tokenizer.pad(rows).tensors().values())
    if name == "padded LoRA":
        # each operator: a padded adapter, tokens for it and for θ = 0, one share of the gradient (one as a seed),
        # gradients; hidden states under both padded adapters and, from one operator, without adapter
        raw = 2 * (weights + 3 * tokens + weights) + hidden + 3 * hidden
    else:
        # each operator that takes part gets adapters and tokens, twice, and returns gradients; one of them gets a
        # cotangent (noise travels as a seed), and one returns hidden states
        operators = len(urls) if name == "P3EFT" else 1
        raw = operators * (weights + 2 * tokens + weights) + 2 * len(adapters) * hidden
    backbone.close()
    return {"socket": sent, "raw tensors": raw, "ratio": sent / raw, "rank": rank}


def main() -> None:
    texts, labels = sentences(BATCH)
    with servers() as urls:
        write("wire_bytes", {f"{name} step": measure(urls, texts, labels, name) for name in METHODS})


if __name__ == "__main__":
    main()
