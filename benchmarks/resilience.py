"""Kill -9 one of two operators in the middle of a step, start it again: same weights as the undisturbed run?

The second operator dies just as the first one gets its share of a gradient.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import MODEL, sentences, write
from blindtune.cli.options import make_lora_config
from blindtune.client import Backbone, Patience
from blindtune.methods import P3EFT, LinearHead, PrivateModel
from blindtune.privacy.randomness import SecureGenerator
from blindtune.training import Examples, TrainConfig, Trainer

STEPS, KILLED_AT = 12, 5


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "blindtune", "serve", "--model", MODEL, "--port", str(port), "--no-auth"]
    process = subprocess.Popen(
        [*command, "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Serving"):
            break
    return process


def train(urls: list[str], in_step: Callable[[int], None]) -> tuple[torch.Tensor, int]:
    """Final weights of adapters and head, and how often the client had to wait."""
    waits: list[str] = []
    backbone = Backbone(
        urls, max_length=48, num_adapters=0, patience=Patience(total=300), on_wait=lambda url, _: waits.append(url)
    )
    backbone.adapter_config = make_lora_config(backbone.info, rank=8, alpha=16, targets=None, layers="upper")
    texts, labels = sentences(STEPS * 16)
    model = PrivateModel(
        backbone,
        LinearHead(backbone.hidden_size, 2),
        P3EFT(steps=STEPS),
        generator=SecureGenerator(bytes(32)),  # equal shares in both runs, so that weights can be compared bit by bit
    )
    trainer = Trainer(model, Examples(list(texts), labels, ["0", "1"]), TrainConfig(steps=STEPS, batch_size=16))
    trainer.prepare()
    operator = backbone.pool.operators[0]
    send = operator.backward

    def sending(*arguments: Any) -> torch.Tensor:
        in_step(trainer.done)
        return send(*arguments)

    operator.backward = sending  # type: ignore[method-assign]
    for _ in trainer.steps():
        pass
    backbone.close()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), len(waits)


def main() -> None:
    ports = [free_port(), free_port()]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    processes = [serve(port) for port in ports]
    down: list[float] = []
    reviving: list[threading.Thread] = []

    def kill(step: int) -> None:
        if step != KILLED_AT or down or reviving:
            return
        start = time.perf_counter()
        processes[1].send_signal(signal.SIGKILL)
        processes[1].wait()

        def revive() -> None:
            processes[1] = serve(ports[1])
            down.append(time.perf_counter() - start)

        reviving.append(threading.Thread(target=revive))
        reviving[0].start()

    try:
        undisturbed, _ = train(urls, lambda step: None)
        disturbed, waits = train(urls, kill)
        reviving[0].join()
    finally:
        for process in processes:
            process.terminate()
    difference = float((undisturbed - disturbed).abs().max())
    write(
        "resilience",
        {
            "steps": STEPS,
            "killed in step": KILLED_AT + 1,
            "seconds without the operator": down[0],
            "client's repeated attempts": waits,
            "largest difference of final weights": difference,
            "bit-identical": bool(torch.equal(undisturbed, disturbed)),
        },
    )


if __name__ == "__main__":
    main()
