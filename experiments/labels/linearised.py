"""Trains what padded LoRA trains, h(x, 0) + J(x) δ, in this process and without pads, to look at optimizers quickly.

python -m experiments.labels.linearised TASK [--arms "lr=0.001;lr=0.0003,readout=all;optimizer=sgd,lr=0.3"]

It shows validation accuracy and the training loss in sixths of the run. Nothing here is a result: results come from
`experiments.labels.run`, with operators, pads and shares.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blindtune.cli.options import make_lora_config
from blindtune.client import select_layers
from blindtune.data import BatchPlan
from blindtune.labels import LinearHead
from blindtune.models import LoraAdapter, Tokenizer
from blindtune.models.tokenizer import TokenRow
from blindtune.wire import Limits, Readout
from experiments.labels.run import Stage, read_settings, set_stage
from experiments.labels.tasks import TASKS

PUBLIC = "7" * 64
"""Seed of the fixed A matrices."""


@dataclass(frozen=True)
class Look:
    """One setting. `linear=false` trains plain LoRA, as a reference."""

    lr: float = 1e-3
    head_lr: float = 2e-3
    optimizer: str = "adam"
    epochs: float = 1.0
    warmup: int = 10
    batch: int = 32
    rank: int = 32
    readout: str = "last"
    linear: bool = True
    squared: bool = False
    seed: int = 1


class Linearised:
    """A task's texts, and the hosted model around θ = 0."""

    def __init__(self, stage: Stage, look: Look) -> None:
        self.stage, self.look, self.backbone = stage, look, stage.backbone
        self.tokenizer = Tokenizer(
            self.backbone.tokenizer,
            pad_token_id=self.backbone.pad_token_id,
            with_types=self.backbone.info("model", Limits()).token_type_ids,
        )
        info = self.backbone.info("model", Limits())
        self.readout = Readout(pooling=info.pooling, layers=select_layers(info, look.readout))
        layers = f"{stage.task.first}-{info.layers - 1}"
        config = make_lora_config(info, rank=look.rank, alpha=2 * look.rank, targets=None, layers=layers)
        generator = torch.Generator().manual_seed(look.seed)
        self.adapter = LoraAdapter(config, info, generator=generator, a_seed=PUBLIC if look.linear else None)

    def rows(self, texts: Any) -> list[TokenRow]:
        return self.tokenizer.rows(texts, max_length=self.stage.task.max_length)

    def hidden(self, rows: list[TokenRow]) -> tuple[Tensor, Tensor]:
        """h(x, 0) and h(x, 0) + J δ, by central differences along δ; or h(x, θ) twice."""
        tokens, weights = self.tokenizer.pad(rows), self.adapter.vector().detach()
        norm = float(weights.norm())
        with torch.no_grad():
            if not self.look.linear or norm == 0:
                both = self.backbone.forward(tokens, self.readout, self.adapter.layout, weights.unsqueeze(0))
                return both[0], both[0]
            step = 1e-3 * len(weights) ** 0.5 / norm
            stacked = torch.stack([torch.zeros_like(weights), step * weights, -step * weights])
            base, ahead, behind = self.backbone.forward(tokens, self.readout, self.adapter.layout, stacked)
        return base, base + (ahead - behind) / (2 * step)

    def gradient(self, rows: list[TokenRow], cotangent: Tensor) -> Tensor:
        """J(x)ᵀ cotangent, at 0 or at the adapter."""
        weights = self.adapter.vector().detach()
        leaf = (torch.zeros_like(weights) if self.look.linear else weights).unsqueeze(0).requires_grad_()
        hidden = self.backbone.forward(self.tokenizer.pad(rows), self.readout, self.adapter.layout, leaf)[0]
        return torch.autograd.grad(hidden, leaf, cotangent)[0][0]


def train(stage: Stage, look: Look, title: str) -> None:
    """Trains, and prints one line."""
    model = Linearised(stage, look)
    rows, labels = model.rows(stage.train.texts), torch.tensor(stage.train.labels)
    frozen = torch.cat([model.hidden(rows[i : i + 64])[0] for i in range(0, len(rows), 64)])
    head = LinearHead(frozen.shape[1], len(stage.train.classes))
    head.fit(frozen, labels)
    parameters = [p for p in model.adapter.parameters() if p.requires_grad]
    groups = [{"params": parameters, "lr": look.lr}, {"params": list(head.parameters()), "lr": look.head_lr}]
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
        if look.optimizer == "adam"
        else torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    )
    plan = BatchPlan([len(row) for row in rows], look.batch, look.seed)
    steps, losses, start = round(look.epochs * math.ceil(len(rows) / look.batch)), [], time.perf_counter()
    for step in range(steps):
        factor = min(1.0, (step + 1) / look.warmup) * max(0.03, 1 - step / steps)
        for group, rate in zip(optimizer.param_groups, (look.lr, look.head_lr), strict=True):
            group["lr"] = rate * factor
        indices = plan.batch(step)
        some, wanted = [rows[i] for i in indices], labels[indices]
        hidden = model.hidden(some)[1].requires_grad_()
        logits = head(hidden)
        targets = 2.0 * F.one_hot(wanted, logits.shape[-1]).float() - 1.0
        loss = (logits - targets).square().mean() if look.squared else F.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        assert hidden.grad is not None
        parts = model.adapter.layout.split(model.gradient(some, hidden.grad))
        for name, matrices in model.adapter.named_matrices().items():
            for parameter, gradient in zip(matrices, parts[name], strict=True):
                if parameter.requires_grad:
                    parameter.grad = gradient.clone()
        optimizer.step()
        losses.append(float(loss.detach()))
    held = model.rows(stage.validation.texts)
    with torch.no_grad():
        predicted = torch.cat([head(model.hidden(held[i : i + 64])[1]).argmax(-1) for i in range(0, len(held), 64)])
    accuracy = float((predicted == torch.tensor(stage.validation.labels)).float().mean())
    sixth = max(1, steps // 6)
    curve = " ".join(f"{sum(losses[i : i + sixth]) / sixth:.3f}" for i in range(0, 6 * sixth, sixth))
    print(f"{title}: validation {accuracy:.4f}, loss {curve}, {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--arms", default="lr=0.001;lr=0.0003;optimizer=sgd,lr=0.3")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stage = set_stage(options.task)
    known = {f.name for f in fields(Look)}
    for arm in options.arms.split(";"):
        _, settings = read_settings("look+" + arm.replace(",", "+"))
        assert set(settings) <= known, settings
        train(stage, Look(**settings), arm)


if __name__ == "__main__":
    main()
