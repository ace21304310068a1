"""Bytes on the wire in one step, counted at the socket by a relay, against the raw tensors that must travel."""

from __future__ import annotations

import socket
import threading

from benchmarks.common import BATCH, sentences, servers, write
from blindtune.cli.options import make_lora_config
from blindtune.client import Backbone
from blindtune.methods import SharedGradients
from blindtune.privacy.randomness import SecureGenerator


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


def measure(urls: list[str], texts: list[str], n: int) -> dict[str, float]:
    """The second of two steps (connections are open): socket bytes against raw tensors."""
    relays = [Relay(int(url.rsplit(":", 1)[1])) for url in urls]
    backbone = Backbone([relay.url for relay in relays], max_length=48, num_adapters=0)
    backbone.adapter_config = make_lora_config(backbone.info, rank=8, alpha=16, targets=None, layers="upper")
    backbone.set_adapters(n)
    if n > 1:
        backbone.channel = SharedGradients(2, 1.0, 1000.0, SecureGenerator())
    rows = backbone.rows(texts)
    for step in range(2):
        before = sum(relay.bytes for relay in relays)
        backbone(rows).pow(2).mean().backward()
        for parameter in backbone.parameters():  # new adapters for the next step
            parameter.data += 1e-3
        if step == 0:
            continue
        sent = sum(relay.bytes for relay in relays) - before
    operators = len(urls) if n > 1 else 1
    tokens = backbone.tokenizer.pad(rows)
    weights = sum(adapter.layout.size for adapter in backbone.lora_adapters()) * 4
    hidden = n * len(rows) * backbone.hidden_size * 4
    token_bytes = sum(tensor.nbytes for tensor in tokens.tensors().values())
    # each operator gets tokens and adapters and returns gradients; one of them gets a cotangent (noise travels as a
    # seed), and one returns hidden states
    raw = operators * (weights + token_bytes + weights) + hidden + hidden
    backbone.close()
    return {"socket": sent, "raw tensors": raw, "ratio": sent / raw}


def main() -> None:
    texts, _ = sentences(BATCH)
    with servers() as urls:
        write("wire_bytes", {"LoRA step": measure(urls, texts, 1), "P3EFT step": measure(urls, texts, 2)})


if __name__ == "__main__":
    main()
