"""What training in the tangent space can reach, and how fast optimizers get there: h(x, 0) + J(x) δ without pads.

python -m experiments.labels.tangent_kernel TASK [--first 3] [--rank 16] [--optimizers]

Padded LoRA trains δ in z = W (h(x, 0) + J(x) δ). With the head W of logistic regression on frozen states, each
class has a margin that is linear in δ, and gradients g(x) of it. Ridge regression on the kernel ⟨g(x), g(x')⟩ is
the best that any optimizer could do with a squared loss, given the ridge penalty, which is chosen on validation.
With `--optimizers` (two classes only), optimizers train δ in batches on the same gradients. One JSON file for each
task and lowest block.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blindtune.labels import LinearHead
from blindtune.models import Tokenizer
from blindtune.wire import Limits
from experiments.labels.run import RESULTS, Stage, set_stage

FOLDER = RESULTS / "tangent_kernel"
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""In units of the kernel's mean diagonal."""
CHUNK = 64


@dataclass(frozen=True)
class Look:
    """One optimizer. `squared` for half the squared error to ±2, cross entropy otherwise."""

    optimizer: str
    lr: float
    epochs: float
    squared: bool = False
    batch: int = 32
    warmup: float = 0.1


LOOKS = (
    Look("adam", 1e-3, 2),
    Look("adam", 2e-3, 2),
    Look("adam", 5e-4, 4),
    Look("adam", 1e-3, 4),
    Look("adam", 1e-3, 2, squared=True),
    Look("adam", 2e-3, 2, squared=True),
    Look("adam", 5e-4, 4, squared=True),
    Look("adam", 1e-3, 4, squared=True),
    Look("sgd", 0.05, 2),
    Look("sgd", 0.1, 2),
    Look("sgd", 0.2, 2),
    Look("sgd", 0.05, 4),
    Look("sgd", 0.1, 4),
    Look("sgd", 0.02, 2, squared=True),
    Look("sgd", 0.05, 2, squared=True),
    Look("sgd", 0.02, 4, squared=True),
    Look("sgd", 0.05, 4, squared=True),
)


class Tangents:
    """A task's texts, their frozen states, and gradients of margins with respect to B of all linear layers.

    Args:
        first: lowest block with adapters.
        rank: rows of each A.
    """

    def __init__(self, stage: Stage, first: int, rank: int) -> None:
        backbone = stage.backbone
        info = backbone.info("model", Limits())
        tokenizer = Tokenizer(backbone.tokenizer, pad_token_id=backbone.pad_token_id, with_types=info.token_type_ids)
        self.tokenizer, self.model, self.hidden_size = tokenizer, backbone.model, backbone.hidden_size
        parts = (stage.train, stage.validation, stage.test)
        self.rows = [tokenizer.rows(part.texts, max_length=stage.task.max_length) for part in parts]
        self.labels = [torch.tensor(part.labels) for part in parts]
        self.layers = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and name.startswith("encoder.layer.")
            and int(name.split(".")[2]) >= first
        }  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        self.a = {
            name: torch.randn(rank, layer.in_features, generator=generator) / math.sqrt(layer.in_features)
            for name, layer in self.layers.items()
        }
        self.size = sum(rank * layer.out_features for layer in self.layers.values())

    def run(self, rows: Sequence[Any], directions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Frozen states `(N, d)`, and the gradient of direction · state for each direction, `(N, c, P)`."""
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        count = 0 if directions is None else len(directions)
        states = torch.zeros(len(rows), self.hidden_size)
        gradients = torch.zeros(len(rows), count, self.size if count else 0)
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def watch(name: str) -> Any:
            def hook(_module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                if not output.requires_grad:
                    output.requires_grad_(True)
                seen[name] = inputs[0].detach(), output

            return hook

        hooks = [layer.register_forward_hook(watch(name)) for name, layer in self.layers.items()] if count else []
        for start in range(0, len(order), CHUNK):
            indices = order[start : start + CHUNK]
            tokens = self.tokenizer.pad([rows[index] for index in indices])
            mask = (torch.arange(tokens.input_ids.shape[1])[None] < tokens.lengths[:, None]).long()
            types = {} if tokens.token_type_ids is None else {"token_type_ids": tokens.token_type_ids.long()}
            with torch.set_grad_enabled(count > 0):
                last = self.model(input_ids=tokens.input_ids.long(), attention_mask=mask, **types).last_hidden_state
                pooled = (last * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            states[indices] = pooled.detach()
            for number in range(count):
                outputs = [output for _, output in seen.values()]
                assert directions is not None
                at_outputs = torch.autograd.grad((pooled @ directions[number]).sum(), outputs, retain_graph=True)
                gradients[indices, number] = torch.cat(
                    [
                        torch.einsum("bto,btr->bor", gradient, (inputs * mask[..., None]) @ self.a[name].T).flatten(1)
                        for (name, (inputs, _)), gradient in zip(seen.items(), at_outputs, strict=True)
                    ],
                    dim=1,
                )
            seen.clear()
        for hook in hooks:
            hook.remove()
        return states, gradients


def accuracy(scores: Tensor, labels: Tensor) -> float:
    predicted = scores.argmax(-1) if scores.shape[-1] > 1 else (scores[:, 0] > 0).long()
    return round(float((predicted == labels).float().mean()), 4)


def ceiling(tangents: Tangents, directions: Tensor, texts: int) -> tuple[list[dict[str, float]], list[Tensor]]:
    """Ridge regression on the kernel of each margin; also the gradients of the last one."""
    scores = [[torch.zeros(len(labels), len(directions)) for labels in tangents.labels[1:]] for _ in RIDGES]
    gradients: list[Tensor] = []
    for number, direction in enumerate(directions):
        gradients = [tangents.run(rows, direction[None])[1][:, 0] for rows in tangents.rows]
        kernels = [part @ gradients[0].T for part in gradients]
        size = kernels[0].diagonal().mean()
        positive = tangents.labels[0] == (1 if len(directions) == 1 else number)
        targets = 2.0 * positive.float() - 1.0
        for index, ridge in enumerate(RIDGES):
            solved = torch.linalg.solve(kernels[0] / size + ridge * torch.eye(texts), targets)
            for part, kernel in zip(scores[index], kernels[1:], strict=True):
                part[:, number] = kernel / size @ solved
        print(f"  margin {number + 1} of {len(directions)}", flush=True)
    rows = []
    for ridge, (validation, test) in zip(RIDGES, scores, strict=True):
        found = (accuracy(validation, tangents.labels[1]), accuracy(test, tangents.labels[2]))
        rows.append({"ridge": ridge, "validation": found[0], "test": found[1]})
    return rows, gradients


def train(look: Look, gradients: list[Tensor], offsets: list[Tensor], labels: list[Tensor]) -> dict[str, Any]:
    """Trains δ in batches on margins offset + ⟨g, δ⟩. Returns the losses in sixths of the run and accuracies."""
    delta = torch.zeros(gradients[0].shape[1], requires_grad=True)
    if look.optimizer == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW([delta], betas=(0.9, 0.99), weight_decay=0.0)
    else:
        optimizer = torch.optim.SGD([delta], momentum=0.9, nesterov=True)
    count, generator = len(labels[0]), torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(math.ceil(look.epochs) + 1)])
    steps, losses = round(look.epochs * count / look.batch), []
    wanted = labels[0].float()
    for step in range(steps):
        factor = min(1.0, (step + 1) / (look.warmup * steps)) * max(0.03, 1 - step / steps)
        optimizer.param_groups[0]["lr"] = look.lr * factor
        indices = order[step * look.batch : (step + 1) * look.batch]
        margins = offsets[0][indices] + gradients[0][indices] @ delta
        if look.squared:
            loss = (margins - (4 * wanted[indices] - 2)).square().mean() / 8
        else:
            loss = F.binary_cross_entropy_with_logits(margins, wanted[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    sixth = max(1, steps // 6)
    with torch.no_grad():
        found = [accuracy((o + g @ delta)[:, None], y) for g, o, y in zip(gradients, offsets, labels, strict=True)][1:]
    curve = [round(sum(losses[i : i + sixth]) / sixth, 4) for i in range(0, 6 * sixth, sixth)]
    return {**asdict(look), "validation": found[0], "test": found[1], "losses": curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("sst2", "mrpc", "trec"))
    parser.add_argument("--first", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--optimizers", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    tangents = Tangents(set_stage(options.task, 0), options.first, options.rank)
    states = [tangents.run(rows, None)[0] for rows in tangents.rows]
    classes = int(tangents.labels[0].max()) + 1
    head = LinearHead(states[0].shape[1], classes)
    head.fit(states[0], tangents.labels[0])
    weights = (head.linear.weight / head.scale).detach()
    directions = weights - weights.mean(0) if classes > 2 else (weights[1] - weights[0])[None]
    rows, gradients = ceiling(tangents, directions, len(tangents.labels[0]))
    with torch.no_grad():
        logits = [head(part) for part in states]
    result: dict[str, Any] = {
        "task": options.task, "first": options.first, "rank": options.rank, "parameters": tangents.size,
        "frozen": [accuracy(part, labels) for part, labels in zip(logits[1:], tangents.labels[1:], strict=True)],
        "ridge": rows,
    }  # fmt: skip
    print(json.dumps(result), flush=True)
    if options.optimizers:
        offsets = [part[:, 1] - part[:, 0] for part in logits]
        result["optimizers"] = []
        for look in LOOKS:
            result["optimizers"].append(train(look, gradients, offsets, tangents.labels))
            print(json.dumps(result["optimizers"][-1]), flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{options.task}-first{options.first}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
