"""Trains methods on tasks and attacks what two operators recorded. One JSON file for each run; finished runs are kept.

python -m experiments.labels.run TASK [--arms lora,p3eft] [--seeds 1,2,3] [--selection]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from blindtune.audit import (
    Attacked,
    Finding,
    Plan,
    Recomputation,
    Verdict,
    attack_view,
    join_views,
    read_view,
)
from blindtune.cli.audit import label_rows
from blindtune.cli.options import make_lora_config
from blindtune.client import Backbone
from blindtune.methods import METHODS, LinearHead, PrivateModel, make_method
from blindtune.models import FrozenBackbone, load_backbone
from blindtune.training import Examples, TrainConfig, Trainer, predict, scores
from blindtune.wire import Transcript
from experiments.labels.tasks import TASKS, Task
from experiments.local import LowerLayers, close_pool, local_pool

RESULTS = Path(__file__).parents[1] / "results" / "labels"
LOOKS = 5
COMPUTED = ("activation", "shift", "sent activation")


@dataclass(frozen=True)
class Arm:
    """A method with its settings; `rank` and `lr` are the method's own if left out."""

    method: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    rank: int | None = None
    lr: float | None = None


ARMS: dict[str, Arm] = {
    "head_only": Arm("head_only"),
    "lora": Arm("lora"),
    "p3eft": Arm("p3eft"),
    **{f"dc-{weight}": Arm("dc", {"activation_weight": weight}) for weight in (0.01, 0.03, 0.1, 0.3, 1.0)},
    **{f"pslf-{epsilon}": Arm("pslf", {"epsilon": epsilon}) for epsilon in (0.5, 1.0, 2.0, 4.0)},
    **{
        f"randomized_response-{epsilon}": Arm("randomized_response", {"epsilon": epsilon})
        for epsilon in (1.0, 2.0, 4.0)
    },
    **{
        f"published-{weight}": Arm("p3eft_published", {"activation_weight": weight})
        for weight in (0.01, 0.03, 0.1, 0.3, 1.0)
    },
}
MAIN = ["lora", "p3eft", "published-0.3", "dc-0.1", "pslf-1.0", "head_only"]


@dataclass
class Stage:
    """What all runs on one task share: data, the model with its lower layers computed, the attacker's copy of it."""

    name: str
    task: Task
    backbone: FrozenBackbone
    train: Examples
    validation: Examples
    test: Examples


def set_stage(name: str) -> Stage:
    """Loads a task and runs the lower layers on all its texts."""
    task = TASKS[name]
    train, validation, test = task.load()
    backbone = load_backbone(task.model)
    lower = LowerLayers(backbone, task.first)
    with tempfile.TemporaryDirectory() as folder:
        pool = local_pool(backbone, [Path(folder)])
        tokenizer = pool.operators[0].tokenizer()
        close_pool(pool)
    start = time.perf_counter()
    for part in (train, validation, test):
        lower.compute(tokenizer.rows(part.texts, max_length=task.max_length), tokenizer)
    print(
        f"{name}: {len(lower.known)} texts through {task.first} blocks in {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    return Stage(name, task, backbone, train, validation, test)


def run(stage: Stage, arm_name: str, seed: int, *, selection: bool = False) -> dict[str, Any]:
    """One run: trained, evaluated on validation (and, unless for selection, on test), attacked."""
    arm, task = ARMS[arm_name], stage.task
    kind = METHODS[arm.method]
    rank, lr = arm.rank or kind.default_rank, arm.lr or kind.default_lr
    options = dict(arm.options)
    if "steps" in kind.__dataclass_fields__:
        options.setdefault("steps", task.steps)
    work = Path(tempfile.mkdtemp(prefix="blindtune-"))
    folders = [work / "a", work / "b"]
    try:
        pool = local_pool(stage.backbone, folders)
        backbone = Backbone(pool, num_adapters=0, max_length=task.max_length)
        layers = f"{task.first}-{backbone.info.layers - 1}"
        backbone.adapter_config = make_lora_config(
            backbone.info, rank=rank, alpha=2 * rank, targets=None, layers=layers
        )
        head = LinearHead(backbone.hidden_size, len(stage.train.classes))
        model = PrivateModel(backbone, head, make_method(arm.method, options), seed=seed)
        config = TrainConfig(steps=task.steps, seed=seed, learning_rate=lr)
        trainer = Trainer(model, stage.train, config)
        start = time.perf_counter()
        trainer.prepare()
        frozen = accuracy_frozen(model, stage.test)
        losses = []
        if model.method.num_adapters:
            for step in trainer.steps():
                losses.append(round(step.losses["task"], 4))
                if step.step % 50 == 0:
                    print(f"  {arm_name} seed {seed}: step {step.step}, loss {sum(losses[-50:]) / 50:.3f}", flush=True)
        seconds = time.perf_counter() - start
        result: dict[str, Any] = {
            "task": stage.name, "arm": arm_name, "method": arm.method, "options": options, "seed": seed, "rank": rank,
            "learning_rate": lr, "steps": task.steps, "train_examples": len(stage.train),
            "validation": evaluate(model, stage.validation),
        }  # fmt: skip
        if not selection:
            result |= {"test": evaluate(model, stage.test), "frozen_test": frozen}
        result |= {"report": model.method.report(), "losses": losses, "train_seconds": round(seconds, 1)}
        close_pool(pool)
        if model.method.num_adapters:
            result["audit"] = audit(stage, folders)
        result["seconds"] = round(time.perf_counter() - start, 1)
        return result
    finally:
        shutil.rmtree(work, ignore_errors=True)


def accuracy_frozen(model: PrivateModel, examples: Examples) -> dict[str, float]:
    """The head before any adapter is trained."""
    with torch.no_grad():
        chances = model.head(model.backbone.frozen(examples.texts)).softmax(-1)
    return scores(chances, torch.tensor(examples.labels))


def evaluate(model: PrivateModel, examples: Examples) -> dict[str, float]:
    return scores(predict(model, examples.texts), torch.tensor(examples.labels))


def audit(stage: Stage, folders: list[Path]) -> dict[str, Any]:
    """Both operators, and both together, at `LOOKS` moments on a sample of the training texts."""
    views = [read_view(Transcript(folder), name) for folder, name in zip(folders, ("A", "B"), strict=True)]
    views = [view for view in views if view.checkpoints]
    plan = Plan(label_rows(stage.train, views, stage.backbone), LOOKS, 1, stage.task.attacked)
    recompute = Recomputation(stage.backbone)
    attacked = [attack_view(view, plan, recompute) for view in views]
    verdict = Verdict(attacked, [])
    summary = summarise(verdict)
    together = Plan(plan.labels, 1, 1, stage.task.attacked)
    joined = attack_view(join_views(views), together, recompute) if len(views) > 1 else None
    if joined is not None:
        summary["colluding"] = best_by_attack([joined], "")
    return summary


def summarise(verdict: Verdict) -> dict[str, Any]:
    """The numbers that tables and figures need."""
    few = verdict.few_labels
    return {
        "unsupervised": best_by_attack(verdict.attacked, *COMPUTED),
        "gradients": best_by_attack(verdict.attacked, "gradient"),
        "headline": asdict(verdict.headline),
        "frozen": asdict(verdict.frozen),
        "chance": asdict(verdict.chance),
        "component": verdict.component.auc,
        "frozen_component": verdict.frozen_component.auc,
        "probe": asdict(verdict.probe),
        "frozen_probe": asdict(verdict.frozen_probe),
        "few_labels": {k: {"strongest": asdict(best), "frozen": frozen.auc if frozen else None}
                       for k, (best, frozen) in few.items()},
        "curves": curves(verdict.findings),
    }  # fmt: skip


def best_by_attack(attacked: list[Attacked], *kinds: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for f in (f for result in attacked for f in result.findings):
        if f.knows == "nothing" and f.channel.startswith(kinds or ("",)) and f.channel != "frozen model":
            found[f.attack] = max(round(f.auc, 4), found.get(f.attack, 0.0))
    return found


def curves(findings: list[Finding]) -> dict[str, dict[int, float]]:
    """For each channel the best attack without labels at each look."""
    found: dict[str, dict[int, float]] = {}
    for f in findings:
        if f.knows == "nothing":
            at = found.setdefault(f.channel, {})
            at[f.step] = max(round(f.auc, 4), at.get(f.step, 0.0))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--arms", default=",".join(MAIN))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--selection", action="store_true", help="validation only, into selection/")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = RESULTS / ("selection" if options.selection else "") / options.task
    folder.mkdir(parents=True, exist_ok=True)
    stage: Stage | None = None
    for seed in options.seeds.split(","):
        for arm in options.arms.split(","):
            path = folder / f"{arm}-seed{seed}.json"
            if path.exists():
                continue
            stage = stage or set_stage(options.task)
            result = run(stage, arm, int(seed), selection=options.selection)
            path.write_text(json.dumps(result, indent=1) + "\n")
            shown = result.get("test") or result["validation"]
            attacks = result.get("audit", {}).get("unsupervised", {})
            print(
                f"{options.task} {arm} seed {seed}: accuracy {shown['accuracy']:.4f}, "
                f"best attack {max(attacks.values(), default=0.5):.3f}, {result['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
