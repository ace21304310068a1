"""Time of steps: remote against local, padded LoRA against LoRA, retained graphs against recomputation."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import BATCH, LocalPeft, interleaved, ratio, sentences, servers, write
from benchmarks.equivalence import config
from blindtune.cli.options import make_lora_config
from blindtune.client import Backbone, PlainChannel
from blindtune.data import Examples
from blindtune.labels import P3EFT, LinearHead, PaddedLoRA, PrivateModel
from blindtune.labels.trainer import TrainConfig, Trainer
from blindtune.privacy.adversary import Adversary

REPEATS = 15
RANK = PaddedLoRA.default_rank


def lora_step(urls: list[str], texts: list[str]) -> dict[str, float]:
    """One LoRA step (forward, backward, AdamW) on all layers: through loopback, and with stock PEFT here."""
    torch.set_num_threads(1)
    backbone = Backbone(urls[:1], adapter=config(), max_length=48)
    local = LocalPeft(config(), backbone.lora_adapters()[0])
    rows = backbone.rows(texts)
    tokens = backbone.tokenizer.pad(rows)
    remote_optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-5)
    local_optimizer = torch.optim.AdamW([p for p in local.parameters() if p.requires_grad], lr=1e-5)

    def remote() -> None:
        backbone(rows).pow(2).mean().backward()
        remote_optimizer.step()
        remote_optimizer.zero_grad()

    def here() -> None:
        local(tokens).pow(2).mean().backward()
        local_optimizer.step()
        local_optimizer.zero_grad()

    seconds = interleaved({"remote": remote, "local": here}, REPEATS)
    backbone.close()
    return ratio(seconds, "remote", "local")


def padded_step(urls: list[str], texts: list[str], layers: str) -> dict[str, float]:
    """What one operator does in a padded LoRA step, against two LoRA steps there.

    Padded LoRA (two padded adapters, one for each operator): a pass with the padded adapter, a pass at θ = 0 with its
    graph, one share of the gradient. All calls go to one server, one after the other, as the operator would get them.
    """
    backbone = Backbone(urls[:1], max_length=48, num_adapters=0)
    backbone.adapter_config = make_lora_config(backbone.info, rank=RANK, alpha=2 * RANK, targets=None, layers=layers)
    plain = Backbone(urls[:1], max_length=48, num_adapters=0)
    plain.adapter_config = make_lora_config(plain.info, rank=8, alpha=16, targets=None, layers=layers)
    plain.set_adapters(1)
    backbone.set_adapters(1, a_seed="00" * 32)
    rows = plain.rows(texts)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-5)
    everyone = PlainChannel()
    cotangent = torch.randn(1, len(rows), backbone.hidden_size)

    def one_operator() -> None:
        batch = backbone.batch(rows, (0,), None)
        noise = torch.randn_like(batch.weights)  # a new adapter at each step
        everyone.hidden(batch.with_weights(0.01 * noise), backbone.pool, retain=False)
        base = batch.with_weights(torch.zeros_like(noise))
        base.forward(backbone.pool, 0, retain=True)
        base.backward(backbone.pool, 0, cotangent.unsqueeze(0))

    def twice() -> None:
        for _ in range(2):
            plain(rows).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    seconds = interleaved({"padded LoRA": one_operator, "2 x LoRA": twice}, REPEATS)
    backbone.close()
    plain.close()
    return ratio(seconds, "padded LoRA", "2 x LoRA")


def p3eft_step(urls: list[str], texts: list[str], layers: str) -> dict[str, float]:
    """The two adapters of P3EFT in one batched pass at one operator, against two LoRA steps there."""
    backbones = {n: Backbone(urls[:1], max_length=48, num_adapters=0) for n in (1, 2)}
    for n, backbone in backbones.items():
        backbone.adapter_config = make_lora_config(backbone.info, rank=8, alpha=16, targets=None, layers=layers)
        backbone.set_adapters(n)
    rows = backbones[1].rows(texts)
    optimizers = {n: torch.optim.AdamW(backbone.parameters(), lr=1e-5) for n, backbone in backbones.items()}

    def step(n: int) -> None:
        backbones[n](rows).pow(2).mean().backward()
        optimizers[n].step()
        optimizers[n].zero_grad()

    def both() -> None:
        step(2)

    def twice() -> None:
        step(1)
        step(1)

    seconds = interleaved({"n = 2": both, "2 x n = 1": twice}, REPEATS)
    return ratio(seconds, "n = 2", "2 x n = 1")


def retained_graph(urls: list[str], texts: list[str]) -> dict[str, float]:
    """A backward call that finds its graph against one that runs the forward pass again."""
    backbone = Backbone(urls[:1], adapter=config(), max_length=48)
    operator = backbone.pool.operators[0]
    tokens = backbone.tokenizer.pad(backbone.rows(texts))
    uploads = backbone.batch(backbone.rows(texts), (0,), None).uploads
    hidden = operator.forward(tokens, uploads, backbone.readout, None, retain=True)
    assert hidden is not None
    cotangent = torch.randn_like(hidden).unsqueeze(0)
    seconds: dict[str, list[float]] = {"retained": [], "recomputed": []}

    def backward() -> None:
        operator.backward(tokens, uploads, backbone.readout, None, cotangent)

    for _ in range(REPEATS):
        operator.forward(tokens, uploads, backbone.readout, None, retain=True)
        for name in ("retained", "recomputed"):  # the first call takes the graph out of the cache
            start = time.perf_counter()
            backward()
            seconds[name].append(time.perf_counter() - start)
    backbone.close()
    return ratio(seconds, "retained", "recomputed")


def regularizer_share(urls: list[str], texts: list[str], labels: list[int]) -> dict[str, float]:
    """The regularizer of P3EFT (an adversary on 4 channels with a buffer of 20 batches) as a part of a step."""
    torch.set_num_threads(1)
    step_seconds = trained_seconds(urls, texts, labels, P3EFT(activation_weight=0.1, shift_weight=0.1), 8)
    adversary = Adversary(4, 384, 2)
    random = torch.Generator().manual_seed(0)
    target = torch.randint(2, (BATCH,), generator=random)
    for _ in range(20):
        adversary.penalty(torch.randn(4, BATCH, 384, generator=random), target)

    def regularize() -> None:
        hidden = torch.randn(4, BATCH, 384, generator=random).requires_grad_()
        adversary.penalty(hidden, target).sum().backward()

    seconds = sorted(interleaved({"regularizer": regularize}, REPEATS)["regularizer"])
    middle = seconds[len(seconds) // 2]
    return {"seconds": middle, "step_seconds": step_seconds, "share": middle / step_seconds}


def trained_seconds(urls: list[str], texts: list[str], labels: list[int], method: Any, rank: int) -> float:
    """Median seconds of a whole step over both operators, as a client sees it."""
    backbone = Backbone(urls, max_length=48, num_adapters=0)
    backbone.adapter_config = make_lora_config(backbone.info, rank=rank, alpha=2 * rank, targets=None, layers="upper")
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), method)
    trainer = Trainer(model, Examples(list(texts), labels, ["0", "1"]), TrainConfig(steps=20))
    trainer.prepare()
    seconds = sorted(step.seconds for step in trainer.steps())
    backbone.close()
    return seconds[len(seconds) // 2]


def main() -> None:
    texts, labels = sentences(20 * BATCH)
    batch = texts[:BATCH]
    measured: dict[str, Callable[[list[str]], dict[str, float]]] = {
        "remote LoRA step / stock PEFT step": lambda urls: lora_step(urls, batch),
        "padded LoRA step at one operator / 2 LoRA steps, all layers": lambda urls: padded_step(urls, batch, "all"),
        "padded LoRA step at one operator / 2 LoRA steps, upper half": lambda urls: padded_step(urls, batch, "upper"),
        "P3EFT step (n = 2) / 2 LoRA steps, all layers": lambda urls: p3eft_step(urls, batch, "all"),
        "P3EFT step (n = 2) / 2 LoRA steps, upper half": lambda urls: p3eft_step(urls, batch, "upper"),
        "backward, retained / recomputed": lambda urls: retained_graph(urls, batch),
        "regularizer's share of a P3EFT step": lambda urls: regularizer_share(urls, texts, labels),
    }
    result: dict[str, dict[str, float]] = {}
    with servers() as urls:
        for name, measure in measured.items():
            result[name] = measure(urls)
            print(f"{name}: {result[name]}", flush=True)
    write("steps", result)


if __name__ == "__main__":
    main()
