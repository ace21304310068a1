"""Trains methods on tasks and attacks what two operators recorded. One JSON file for each run; finished runs are kept.

python -m experiments.labels.run TASK [--arms lora,pslf+epsilon=2] [--seeds 1,2,3] [--selection]

An arm is a method's name, then what differs from its defaults: `rank`, `lr`, `warmup`, `epochs`, `first` (the lowest
block with adapters), `readout` (the layers that the head reads), `head`, `loss`, another option of `TrainConfig`, or
one of its own options. A recipe (`p3eft+recipe=2023`) sets head, rates and clipping too. With `--no-audit`, runs
aren't attacked: they compare accuracy alone, in accuracy/.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from blindtune.audit import (
    FROZEN_MODEL,
    Attacked,
    ChannelKind,
    Finding,
    Knowledge,
    Plan,
    Recomputation,
    Verdict,
    attack_view,
    join_views,
    read_view,
)
from blindtune.audit.labels.run import label_rows
from blindtune.audit.observe import View
from blindtune.cli.options import make_lora_config
from blindtune.client import Backbone
from blindtune.data import Examples
from blindtune.labels import METHODS, LinearHead, Method, PrivateModel, make_head, make_method
from blindtune.labels.losses import find_loss
from blindtune.labels.methods import options_of
from blindtune.labels.metrics import scores
from blindtune.labels.trainer import TrainConfig, Trainer, predict
from blindtune.local import local_operators
from blindtune.models import FrozenBackbone, load_backbone
from blindtune.wire import Transcript
from experiments.labels.published import binary_f1, published
from experiments.labels.tasks import TASKS, Task
from experiments.lower_layers import LowerLayers
from experiments.mpnet import mpnet

RESULTS = Path(__file__).parents[1] / "results" / "labels"
LOOKS = 4
COMPUTED = (ChannelKind.ACTIVATION, ChannelKind.SHIFT, ChannelKind.SENT_ACTIVATION)
MAIN = "lora,padded-lora,p3eft,distance-correlation,pslf,features"


@dataclass(frozen=True)
class Arm:
    """A method with its settings; what is None is the method's own, or the task's."""

    name: str
    method: str
    options: dict[str, Any]
    rank: int | None = None
    lr: float | None = None
    warmup: int = TrainConfig.warmup
    epochs: float = 1.0
    """Factor on the task's steps."""
    first: int | None = None
    """Adapters sit on this block and those above."""
    head: str | None = None
    loss: str = "cross_entropy"
    readout: str | None = None
    """Layers that the head reads; the method's own by default."""
    training: dict[str, Any] = field(default_factory=dict)
    """Further options of `TrainConfig`."""

    @staticmethod
    def parse(name: str) -> Arm:
        """`method+key=value+…`, values in JSON, or bare words."""
        method, given = read_settings(name)
        own = {
            key: given.pop(key)
            for key in ("rank", "lr", "warmup", "epochs", "first", "head", "loss", "readout")
            if key in given
        }
        known = {f.name for f in fields(TrainConfig)} - {"steps", "batch_size", "seed", "learning_rate", "warmup"}
        training = {key: given.pop(key) for key in sorted(known & set(given))}
        return Arm(name, method, given, training=training, **own)


def read_settings(name: str) -> tuple[str, dict[str, Any]]:
    """A method and what differs from its defaults."""
    method, *settings = name.split("+")
    return method, {key: _value(value) for key, value in (setting.split("=") for setting in settings)}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@dataclass
class Stage:
    """What all runs on one task share: data, the model with its lower layers computed, the attacker's copy of it."""

    name: str
    task: Task
    backbone: FrozenBackbone
    train: Examples
    validation: Examples
    test: Examples


def set_stage(name: str, first: int | None = None) -> Stage:
    """Loads a task and runs the layers below the first adapter on all its texts."""
    task = TASKS[name] if first is None else replace(TASKS[name], first=first)
    train, validation, test = task.load()
    backbone = load_backbone(mpnet() if task.model == "mpnet" else task.model)
    lower = LowerLayers(backbone, task.first)
    with tempfile.TemporaryDirectory() as folder:
        pool = local_operators(backbone, record=[Path(folder)])
        tokenizer = pool.operators[0].tokenizer()
        pool.close()
    start = time.perf_counter()
    for part in (train, validation, test):
        lower.compute(tokenizer.rows(part.texts, max_length=task.max_length), tokenizer)
    print(
        f"{name}: {len(lower.known)} texts through {task.first} blocks in {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    return Stage(name, task, backbone, train, validation, test)


def operator_folders(work: Path, m: int) -> list[Path]:
    """Where operators record: two with shares of gradients, else one, which sees every step."""
    return [work / name for name in ("a", "b")[: 2 if m > 1 else 1]]


def make_model(
    stage: Stage,
    method: Method,
    folders: list[Path],
    rank: int,
    seed: int,
    head: str = "linear",
    readout: str | None = None,
    loss: str = "cross_entropy",
) -> PrivateModel:
    """An untrained model over operators in this process, with adapters on the task's upper blocks."""
    pool = local_operators(stage.backbone, record=folders)
    reads = dict(method.reads) | ({} if readout is None else {"readout": readout})
    if stage.task.pair is None:
        reads.pop("pairs", None)
    backbone = Backbone(pool, num_adapters=0, max_length=stage.task.max_length, **reads)
    layers = f"{stage.task.first}-{backbone.info.layers - 1}"
    backbone.adapter_config = make_lora_config(backbone.info, rank=rank, alpha=2 * rank, targets=None, layers=layers)
    made = make_head(head, backbone.hidden_size, len(stage.train.classes), seed=seed)
    return PrivateModel(backbone, made, method, loss=find_loss(loss), seed=seed)


Attacks = Literal["all", "paper", "none"]
"""All attacks on all channels and the paper's measures, the paper's measures alone, or nothing."""


def run(stage: Stage, arm: Arm, seed: int, *, selection: bool = False, attacks: Attacks = "all") -> dict[str, Any]:
    """One run: trained, evaluated on validation (and, unless for selection, on test), attacked."""
    task, kind = stage.task, METHODS[arm.method]
    rank, steps = arm.rank or kind.default_rank, round(arm.epochs * task.steps)
    method = make_method(arm.method, arm.options, steps=steps, head_seed=seed)
    given = {"warmup": arm.warmup, **({"learning_rate": arm.lr} if arm.lr else {}), **arm.training}
    config = TrainConfig(steps=steps, seed=seed, **method.complete_training(given))
    options = options_of(method)
    chosen = set(options) if "recipe" in arm.options else {*arm.options, "steps"}
    recorded = {name: value for name, value in options.items() if name in chosen}
    work = Path(tempfile.mkdtemp(prefix="blindtune-"))
    folders = operator_folders(work, options.get("m", 1))
    try:
        model = make_model(stage, method, folders, rank, seed, arm.head or method.default_head, arm.readout, arm.loss)
        start = time.perf_counter()
        losses: list[float] = []
        frozen: dict[str, float] | None = None
        if method.by_steps:
            trainer = Trainer(model, stage.train, config)
            trainer.prepare()
            frozen = accuracy_frozen(model, stage)
            losses = run_steps(trainer, f"{arm.name} seed {seed}")
        else:
            model.prepare(stage.train.texts, stage.train.labels)
        seconds = time.perf_counter() - start
        traffic = model.backbone.traffic
        result: dict[str, Any] = {
            "task": stage.name, "arm": arm.name, "method": arm.method, "options": recorded, "seed": seed, "rank": rank,
            "learning_rate": config.learning_rate, "warmup": arm.warmup, "steps": steps,
            "training": asdict(config) if method.by_steps else {}, "head": type(model.head).__name__, "loss": arm.loss,
            "train_examples": len(stage.train),
            "received_per_text": round(traffic.received / len(stage.train)),
            "sent_per_text": round(traffic.sent / len(stage.train)),
            "validation": evaluate(model, stage.validation),
        }  # fmt: skip
        if not selection:
            result |= {"test": evaluate(model, stage.test)} | ({} if frozen is None else {"frozen_test": frozen})
        if model.choice is not None:
            result["chosen"] = asdict(model.choice.chosen)
        result |= {"report": model.method.report(), "losses": losses, "train_seconds": round(seconds, 1)}
        model.backbone.pool.close()
        if model.method.num_adapters and attacks != "none":
            views = read_views(folders)
            parts = {"training": stage.train, "validation": stage.validation}
            result["paper"] = published(stage.backbone, views[0], parts, task.attacked, task.max_length)
            if attacks == "all":
                result["audit"] = audit(stage, views, control=arm.method == "padded-lora")
        result["seconds"] = round(time.perf_counter() - start, 1)
        return result
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run_steps(trainer: Trainer, title: str) -> list[float]:
    """All steps, with a line now and then; the losses of the task."""
    losses: list[float] = []
    for step in trainer.steps():
        losses.append(round(step.losses["task"], 4))
        if step.step % 50 == 0:
            print(f"  {title}: step {step.step}, loss {sum(losses[-50:]) / 50:.3f}", flush=True)
    return losses


def accuracy_frozen(model: PrivateModel, stage: Stage) -> dict[str, float]:
    """The head before any adapter is trained; a linear one, if the model's starts from random weights."""
    head = model.head
    if not isinstance(head, LinearHead):
        head = LinearHead(model.backbone.hidden_size, model.classes)
        head.fit(model.backbone.frozen(stage.train.texts), torch.tensor(stage.train.labels))
    with torch.no_grad():
        chances = head(model.backbone.frozen(stage.test.texts)).softmax(-1)
    return scores(chances, torch.tensor(stage.test.labels))


def evaluate(model: PrivateModel, examples: Examples) -> dict[str, float]:
    """Accuracy, macro F1 and loss; for two classes also GLUE's F1."""
    chances, labels = predict(model, examples.texts), torch.tensor(examples.labels)
    binary = {"binary_f1": binary_f1(chances.argmax(-1), labels)} if chances.shape[-1] == 2 else {}
    return {**scores(chances, labels), **binary}


def read_views(folders: list[Path]) -> list[View]:
    """What each operator saw, where it saw adapters."""
    views = [read_view(Transcript(folder), name) for folder, name in zip(folders, ("A", "B"), strict=False)]
    return [view for view in views if view.checkpoints]


def audit(stage: Stage, views: list[View], *, control: bool) -> dict[str, Any]:
    """Both operators, and both together, at `LOOKS` moments on a sample of training texts (gradients: on all of them).

    Args:
        control: whether adapters in random order are attacked too. They make sense where the adapters are random.
    """
    known = label_rows(stage.train.texts, stage.train.labels, views, stage.backbone)
    plan = Plan(known, LOOKS, 1, stage.task.attacked, control=control)
    recompute = Recomputation(stage.backbone)
    attacked = [attack_view(view, plan, recompute) for view in views]
    verdict = Verdict(attacked, [])
    summary = summarise(verdict)
    together = Plan(plan.labels, 1, 1, stage.task.attacked, control=False)
    joined = attack_view(join_views(views), together, recompute) if len(views) > 1 else None
    if joined is not None:
        summary["colluding"] = best_by_attack([joined])
    return summary


def summarise(verdict: Verdict) -> dict[str, Any]:
    """The numbers that tables and figures need."""
    few = verdict.few_labels
    return {
        "unsupervised": best_by_attack(verdict.attacked, *COMPUTED),
        "gradients": best_by_attack(verdict.attacked, ChannelKind.GRADIENT),
        "headline": verdict.headline.to_json(),
        "frozen": verdict.frozen.to_json(),
        "chance": asdict(verdict.chance),
        "component": verdict.component.auc,
        "frozen_component": verdict.frozen_component.auc,
        "probe": verdict.probe.to_json(),
        "computed": {knows: best_of(verdict.findings, knows, *COMPUTED) for knows in Knowledge},
        "frozen_computed": {knows: best_of_controls(verdict.findings, knows) for knows in Knowledge},
        "frozen_probe": verdict.frozen_probe.to_json(),
        "few_labels": {k: {"strongest": best.to_json(), "frozen": frozen.auc if frozen else None}
                       for k, (best, frozen) in few.items()},
        "curves": curves(verdict.findings),
    }  # fmt: skip


def best_by_attack(attacked: list[Attacked], *kinds: ChannelKind) -> dict[str, float]:
    """The best AUC of each attack without labels on channels of some kinds, or on all."""
    found: dict[str, float] = {}
    for f in (f for result in attacked for f in result.findings):
        chosen = f.channel.observes(*kinds) if kinds else f.channel != FROZEN_MODEL
        if f.knows is Knowledge.NOTHING and chosen:
            found[f.attack] = max(round(f.auc, 4), found.get(f.attack, 0.0))
    return found


def best_of(findings: list[Finding], knows: Knowledge, *kinds: ChannelKind) -> float:
    """The best attack with this knowledge on channels of some kinds."""
    return max((f.auc for f in findings if f.knows is knows and f.channel.observes(*kinds)), default=0.5)


def best_of_controls(findings: list[Finding], knows: Knowledge) -> float:
    """The best attack with this knowledge on controls."""
    return max((f.auc for f in findings if f.knows is knows and f.channel.is_control), default=0.5)


def curves(findings: list[Finding]) -> dict[str, dict[int, float]]:
    """For each channel the best attack without labels at each look."""
    found: dict[str, dict[int, float]] = {}
    for f in findings:
        if f.knows is Knowledge.NOTHING:
            at = found.setdefault(str(f.channel), {})
            at[f.step] = max(round(f.auc, 4), at.get(f.step, 0.0))
    return found


@dataclass(frozen=True)
class Job:
    """One run that isn't there yet."""

    path: Path
    arm: Arm
    seed: int
    selection: bool
    attacks: Attacks


_stage: list[Stage] = []
"""The one stage of this process, which workers inherit."""


def work(job: Job) -> str:
    """Does a job in a worker and writes its file; one line about it."""
    result = run(_stage[0], job.arm, job.seed, selection=job.selection, attacks=job.attacks)
    job.path.write_text(json.dumps(result, indent=1) + "\n")
    shown = result.get("test") or result["validation"]
    attacks = result.get("audit", {}).get("unsupervised", {})
    best = f"best attack {max(attacks.values(), default=0.5):.3f}, " if attacks else ""
    return (
        f"{result['task']} {job.arm.name} seed {job.seed}: accuracy {shown['accuracy']:.4f}, loss {shown['loss']:.4f}, "
        f"{best}{result['seconds']:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--arms", default=MAIN)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--selection", action="store_true", help="validation only, into selection/")
    parser.add_argument("--no-audit", action="store_true", help="train and evaluate only, into accuracy/")
    parser.add_argument("--paper-only", action="store_true", help="the paper's measures only (with --selection)")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if options.paper_only and not options.selection:
        parser.error("--paper-only needs --selection: results are reported with all attacks.")
    attacks: Attacks = "none" if options.no_audit else "paper" if options.paper_only else "all"
    folder = RESULTS / ("selection" if options.selection else "accuracy" if options.no_audit else "") / options.task
    jobs = [
        Job(folder / f"{arm}-seed{seed}.json", Arm.parse(arm), int(seed), options.selection, attacks)
        for seed in options.seeds.split(",")
        for arm in options.arms.split(",")
    ]
    do(options.task, jobs, options.workers)


def do(task: str, jobs: list[Job], workers: int) -> None:
    """Does the jobs on one task whose files aren't there yet, in several processes."""
    torch.set_num_threads(1)
    jobs = [job for job in jobs if not job.path.exists()]
    for folder in {job.path.parent for job in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    for first in sorted({job.arm.first for job in jobs}, key=str):
        _stage[:] = [set_stage(task, first)]
        some = [job for job in jobs if job.arm.first == first]
        with multiprocessing.get_context("fork").Pool(min(workers, len(some))) as pool:
            for line in pool.imap_unordered(work, some):
                print(line, flush=True)


if __name__ == "__main__":
    main()
