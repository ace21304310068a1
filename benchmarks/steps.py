"""Time of steps: remote against local, P3EFT against LoRA, retained graphs against recomputation."""

from __future__ import annotations

import time

import torch

from benchmarks.common import BATCH, LocalPeft, interleaved, ratio, sentences, servers, write
from benchmarks.equivalence import config
from blindtune.cli.options import make_lora_config
from blindtune.client import Backbone
from blindtune.client.backbone import PlainChannel
from blindtune.privacy.adversary import Adversary
from blindtune.privacy.decoys import draw_decoys
from blindtune.privacy.randomness import SecureGenerator

REPEATS = 15


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


class OneOperator(PlainChannel):
    """What one operator does in a P3EFT step: forward and one cotangent for every adapter."""

    def choose(self, operators: int, step: int) -> tuple[int, ...]:
        return (0,)


def p3eft_step(urls: list[str], texts: list[str], layers: str) -> dict[str, float]:
    """A step with n = 2 adapters at one operator against two steps with one adapter."""
    backbones = {n: Backbone(urls[:1], max_length=48, num_adapters=0, channel=OneOperator()) for n in (1, 2)}
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
    uploads = backbone._uploads()
    hidden = operator.forward(tokens, uploads, backbone.pooling, None, retain=True)
    assert hidden is not None
    cotangent = torch.randn_like(hidden).unsqueeze(0)
    seconds: dict[str, list[float]] = {"retained": [], "recomputed": []}

    def backward() -> None:
        operator.backward(tokens, uploads, backbone.pooling, None, cotangent)

    for _ in range(REPEATS):
        operator.forward(tokens, uploads, backbone.pooling, None, retain=True)
        for name in ("retained", "recomputed"):  # the first call takes the graph out of the cache
            start = time.perf_counter()
            backward()
            seconds[name].append(time.perf_counter() - start)
    backbone.close()
    return ratio(seconds, "retained", "recomputed")


def regularizer_share(step_seconds: float) -> dict[str, float]:
    """The regularizer (an adversary on 4 channels with a buffer of 20 batches, and decoys) as a part of a step."""
    torch.set_num_threads(1)
    adversary = Adversary(4, 384, 2)
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (BATCH,), generator=random)
    frozen = torch.randn(20 * BATCH, 384, generator=random)
    decoys = draw_decoys(frozen, labels.repeat(20), 2, 2, generator=SecureGenerator())
    for _ in range(20):
        adversary.penalty(torch.randn(4, BATCH, 384, generator=random), labels)

    def regularize() -> None:
        hidden = torch.randn(4, BATCH, 384, generator=random).requires_grad_()
        loss = adversary.penalty(hidden, labels).sum() + decoys.penalty(hidden[:2], frozen[:BATCH], 0.3)
        loss.backward()

    seconds = sorted(interleaved({"regularizer": regularize}, REPEATS)["regularizer"])
    middle = seconds[len(seconds) // 2]
    return {"seconds": middle, "step_seconds": step_seconds, "share": middle / step_seconds}


def p3eft_step_seconds(urls: list[str], texts: list[str], labels: list[int]) -> float:
    """Median seconds of a whole P3EFT step with the adversary on, as a client sees it."""
    from blindtune.methods import P3EFT, LinearHead, PrivateModel
    from blindtune.training import Examples, TrainConfig, Trainer

    backbone = Backbone(urls, max_length=48, num_adapters=0)
    backbone.adapter_config = make_lora_config(backbone.info, rank=8, alpha=16, targets=None, layers="upper")
    method = P3EFT(activation_weight=0.1, shift_weight=0.1)
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), method)
    trainer = Trainer(model, Examples(list(texts), labels, ["0", "1"]), TrainConfig(steps=20))
    trainer.prepare()
    seconds = sorted(step.seconds for step in trainer.steps())
    backbone.close()
    return seconds[len(seconds) // 2]


def main() -> None:
    texts, labels = sentences(20 * BATCH)
    batch = texts[:BATCH]
    with servers() as urls:
        result = {
            "remote LoRA step / stock PEFT step": lora_step(urls, batch),
            "P3EFT step at one operator / 2 LoRA steps, all layers": p3eft_step(urls, batch, "all"),
            "P3EFT step at one operator / 2 LoRA steps, upper half": p3eft_step(urls, batch, "upper"),
            "backward, retained / recomputed": retained_graph(urls, batch),
        }
        result["regularizer's share of a P3EFT step"] = regularizer_share(p3eft_step_seconds(urls, texts, labels))
    write("steps", result)


if __name__ == "__main__":
    main()
