"""Kill -9 one of two operators in the middle of a step, start it again: the weights of an undisturbed run?

The second operator dies just as the first one gets its share of a gradient. Plain LoRA, in turns at the two, ends with
the same bits. Padded adapters and shares have new noise in each run, so their weights are held against two undisturbed
runs; the ledger shows that no step was sent twice.
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
from blindtune.client import Backbone, Operator, Timeout
from blindtune.data import Examples
from blindtune.labels import LinearHead, LoRA, Method, PaddedLoRA, PrivateModel
from blindtune.labels.trainer import TrainConfig, Trainer

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


def train(urls: list[str], method: Method, in_step: Callable[[int], None]) -> tuple[torch.Tensor, int]:
    """Final weights of adapters and head, and how often the client had to wait."""
    waits: list[str] = []
    backbone = Backbone(
        urls, max_length=48, num_adapters=0, timeout=Timeout(total=300), on_wait=lambda url, _: waits.append(url)
    )
    backbone.adapter_config = make_lora_config(backbone.info, rank=8, alpha=16, targets=None, layers="upper")
    texts, labels = sentences(STEPS * 16)
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), method)
    trainer = Trainer(model, Examples(list(texts), labels, ["0", "1"]), TrainConfig(steps=STEPS, batch_size=16))
    trainer.prepare()
    for operator in backbone.pool.operators:
        _before_backward(operator, lambda: in_step(trainer.done))
    for _ in trainer.steps():
        pass
    backbone.close()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), len(waits)


def _before_backward(operator: Operator, call: Callable[[], None]) -> None:
    send = operator.backward

    def sending(*arguments: Any) -> torch.Tensor:
        call()
        return send(*arguments)

    operator.backward = sending  # type: ignore[method-assign]


def main() -> None:
    ports = [free_port(), free_port()]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    processes = [serve(port) for port in ports]
    down: list[float] = []
    reviving: list[threading.Thread] = []

    def kill(step: int) -> None:
        """Once in each run that has it, before the first share of one step."""
        if step != KILLED_AT or armed.pop(step, None) is None:
            return
        start = time.perf_counter()
        processes[1].send_signal(signal.SIGKILL)
        processes[1].wait()

        def revive() -> None:
            processes[1] = serve(ports[1])
            down.append(time.perf_counter() - start)

        reviving.append(threading.Thread(target=revive))
        reviving[-1].start()

    def undisturbed(method: Method) -> torch.Tensor:
        return train(urls, method, lambda step: None)[0]

    armed: dict[int, bool] = {}
    try:
        armed[KILLED_AT] = True
        lora, _ = train(urls, LoRA(), kill)
        reviving[-1].join()
        same = torch.equal(lora, undisturbed(LoRA()))
        padded, again = (undisturbed(PaddedLoRA(steps=STEPS)) for _ in range(2))
        armed[KILLED_AT] = True
        method = PaddedLoRA(steps=STEPS)
        disturbed, waits = train(urls, method, kill)
        reviving[-1].join()
    finally:
        for process in processes:
            process.terminate()
    write(
        "resilience",
        {
            "steps": STEPS,
            "killed in step": KILLED_AT + 1,
            "seconds without the operator": down[-1],
            "client's repeated attempts": waits,
            "LoRA bit-identical": same,
            "padded LoRA, two undisturbed runs: relative difference of final weights": _apart(padded, again),
            "padded LoRA, disturbed and not: relative difference of final weights": _apart(padded, disturbed),
            "padded LoRA, shares counted": method.ledger.messages("share"),
        },
    )


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / one.norm())


if __name__ == "__main__":
    main()
