"""Remote = local: gradients and 50 training steps through two real servers against stock PEFT in one process."""

from __future__ import annotations

import torch
from peft import LoraConfig
from torch.nn import functional as F

from benchmarks.common import BATCH, LocalPeft, relative_error, sentences, servers, write
from blindtune.client import Backbone
from blindtune.data import BatchPlan
from blindtune.labels import PrivateBackprop, PrivateBackpropOptions
from blindtune.models import LoraAdapter
from blindtune.privacy.randomness import SecureGenerator

TARGETS = ["query", "key", "value", "dense"]
STEPS, TRAIN_BATCH = 50, 16


def config() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, exclude_modules=["pooler.dense"])


def randomise(adapters: list[LoraAdapter]) -> None:
    """Adapters in the middle of training: B is no longer zero."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in adapters:
            for _, b in adapter.named_matrices().values():
                b.normal_(std=0.02, generator=random)


def gradient_errors(urls: list[str], texts: list[str]) -> dict[str, float]:
    """Relative error of all adapters' gradients, without shares and with shares at several noise ratios."""
    errors: dict[str, float] = {}
    for ratio in (None, 100.0, 1000.0, 10_000.0):
        backbone = Backbone(urls, adapter=config(), num_adapters=2, max_length=48)
        if ratio is not None:
            backbone.channel = PrivateBackprop(PrivateBackpropOptions(2, 1.0, ratio), SecureGenerator())
        randomise(backbone.lora_adapters())
        hidden = backbone(texts)
        cotangent = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
        cotangent /= cotangent.permute(1, 0, 2).flatten(1).norm(dim=1).view(1, -1, 1) * len(texts)  # norm C = 1 each
        hidden.backward(cotangent)
        pairs = []
        for index, adapter in enumerate(backbone.lora_adapters()):
            local = LocalPeft(config(), adapter)
            local(backbone.tokenizer.pad(backbone.rows(texts))).backward(cotangent[index])
            pairs += [(ours.grad, theirs.grad) for ours, theirs in local.matrices(adapter)]
        errors["without shares" if ratio is None else f"shares at sigma/C = {ratio:.0f}"] = relative_error(pairs)
        backbone.close()
    return errors


def train(step, parameters) -> list[float]:
    """50 steps of AdamW; returns the losses."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for index in range(STEPS):
        loss = step(index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def training_curves(urls: list[str], texts: list[str], labels: list[int]) -> dict[str, object]:
    """The same 50 steps remotely (in the clear, and with shares) and locally."""
    target = torch.tensor(labels)
    result: dict[str, object] = {"steps": STEPS}
    curves: dict[str, list[float]] = {}
    for name in ("plain", "shares at sigma/C = 100"):
        print(f"{STEPS} steps, {name} …", flush=True)
        torch.manual_seed(0)
        backbone = Backbone(urls, adapter=config(), max_length=48)
        if name != "plain":
            options = PrivateBackpropOptions(2, 10.0, float(name.rsplit(" ", 1)[1]))
            backbone.channel = PrivateBackprop(options, SecureGenerator())
        rows = backbone.rows(texts)
        plan = BatchPlan([len(row) for row in rows], TRAIN_BATCH, 0)
        adapter, head = backbone.lora_adapters()[0], torch.nn.Linear(backbone.hidden_size, 2)
        local, local_head = LocalPeft(config(), adapter), torch.nn.Linear(backbone.hidden_size, 2)
        local_head.load_state_dict(head.state_dict())

        def remote_step(index: int, rows=rows, plan=plan, backbone=backbone, head=head) -> torch.Tensor:
            batch = plan.batch(index)
            return F.cross_entropy(head(backbone([rows[i] for i in batch])), target[batch])

        def local_step(index: int, rows=rows, plan=plan, backbone=backbone, local=local, head=local_head):
            batch = plan.batch(index)
            return F.cross_entropy(head(local(backbone.tokenizer.pad([rows[i] for i in batch]))), target[batch])

        curves[f"remote, {name}"] = train(remote_step, [*backbone.parameters(), *head.parameters()])
        trainable = [p for p in local.parameters() if p.requires_grad]
        curves["local"] = train(local_step, [*trainable, *local_head.parameters()])
        difference = max(abs(a - b) for a, b in zip(curves[f"remote, {name}"], curves["local"], strict=True))
        result[name] = {
            "final_weights_relative_error": relative_error(
                [(a.detach(), b.detach()) for a, b in local.matrices(adapter)]
            ),
            "largest_loss_difference": difference,
        }
        backbone.close()
    return {**result, "curves": curves}


def main() -> None:
    texts, labels = sentences(STEPS * TRAIN_BATCH)
    result: dict[str, object] = {}
    for dtype in ("float32", "float64"):
        with servers(dtype) as urls:
            result[f"gradients, servers in {dtype}"] = gradient_errors(urls, texts[:BATCH])
            print(result, flush=True)
    with servers() as urls:
        result["training"] = training_curves(urls, texts, labels)
    write("equivalence", result)


if __name__ == "__main__":
    main()
