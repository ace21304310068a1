"""Trains a design on four tasks together, over a real server on loopback; evaluates it and attacks what was recorded.

python -m experiments.texts.run [--arms online,online+decorrelation_weight=8] [--seeds 1,2]
                                  [--device cuda] [--whole-test]

An arm is a design's name, then what differs from its defaults: `lr`, `epochs`, `rank`, `tune`, `start` (steps of
Online on public text that come before, with `start_weight` of decorrelation), `bottom` and `top` (blocks that the
client holds), `keep` and `distill` (blocks of the emulator, steps of its distillation), `attacks` (texts; 0: none),
`battery` (all), or one of the design's options. `zero-shot`, and `full` and `lora` (of all blocks, in this process) are
arms too.
One JSON file for each run; finished runs are kept, and an interrupted one goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from blindtune.audit.texts import through_codec
from blindtune.cli.processes import local_servers
from blindtune.data.batches import BatchPlan
from blindtune.data.public_text import read_lines
from blindtune.data.questions import TokenizedQuestion
from blindtune.models import Cut, FrozenBackbone, Tokenizer, load_backbone
from blindtune.models.cut.emulator import load_emulator
from blindtune.models.cut.merge import with_tuned_parts
from blindtune.models.cut.parts import CutModel, Part, decoder_of, padding_mask
from blindtune.privacy.randomness import SecureGenerator
from blindtune.texts import CausalBatch, Design, Ends, TrainConfig, make_design, merge_checkpoint, read_tuned_parts
from experiments.labels.run import read_settings
from experiments.labels.tasks import DATA
from experiments.texts.attacks import QUICK, attack_run
from experiments.texts.scoring import Wire, hits, score_questions
from experiments.texts.tasks import (
    PUBLIC,
    TASKS,
    TEST_EACH,
    VALIDATION_EACH,
    path_of,
    questions_of,
    write_training,
)

ROOT = Path(__file__).parents[2]
RESULTS, WORK = ROOT / "experiments" / "results" / "texts", ROOT / ".cache" / "texts"
MODEL, CUT = "smollm2", Cut(2, 2)
WHOLE_TEST = "whole-test"
"""Folder of runs that are evaluated on all test questions."""
BATCH, EPOCHS = 16, 2.0
KEEP, DISTILL, DISTILLED = 10, 320, ("--batch-size", "8", "--max-length", "64", "--lr", "1e-3", "--int8")
MAIN = (
    "zero-shot,full+lr=0.0001,online+up=fp32+down=fp32+battery=all,online,"
    "online+decorrelation_weight=8.0,gradfree,gradfree+start=60+start_weight=8.0,"
    "gradfree+noise=0.02+clip_norm=60.0,gradfree+anonymity=4,gradfree+zo=true,"
    "offline,offsite,offline+tune_emulator=true,offline+tune_emulator=true+keep=18+distill=160,"
    "offline+keep=18+distill=160,gradfree+up=int4+down=int4,gradfree+top=10,lora"
)


@dataclass(frozen=True)
class Arm:
    """A design with its settings."""

    name: str
    method: str
    options: dict[str, Any]
    lr: float = 1e-3
    epochs: float = EPOCHS
    rank: int = 16
    tune: str = "lora"
    start: int = 0
    start_weight: float = 0.0
    attacks: int = 32
    """Texts to attack at each of three moments."""
    bottom: int = CUT.bottom
    """Blocks of the client's bottom."""
    top: int = CUT.top
    """Blocks of the client's top."""
    keep: int = KEEP
    """Blocks of the trunk that the emulator keeps."""
    distill: int = DISTILL
    """Steps of its distillation."""
    battery: str = "quick"
    """`all` attacks, or those that ever were best."""

    @property
    def cut(self) -> Cut:
        return Cut(self.bottom, self.top)

    @property
    def emulated(self) -> bool:
        return make_design(self.method, self.options).emulated

    @staticmethod
    def parse(name: str) -> Arm:
        """`method+key=value+…`."""
        method, given = read_settings(name)
        own = {field.name: given.pop(field.name) for field in fields(Arm) if field.name in given}
        return Arm(name, method, given, **own)


@dataclass
class Stage:
    """What all runs share: the model, questions to report on and to choose on."""

    backbone: FrozenBackbone
    tokenizer: Tokenizer
    test: dict[str, list[TokenizedQuestion]]
    validation: dict[str, list[TokenizedQuestion]]

    @staticmethod
    def set(device: str = "cpu", test_each: int | None = TEST_EACH) -> Stage:
        backbone = load_backbone(MODEL, device=device, cut=CUT)
        tokenizer = Tokenizer(backbone.tokenizer, pad_token_id=backbone.pad_token_id, with_types=False)
        test = {task: questions_of(path_of(task, "test"), tokenizer, test_each) for task in TASKS}
        validation = {task: questions_of(path_of(task, "validation"), tokenizer, VALIDATION_EACH) for task in TASKS}
        return Stage(backbone, tokenizer, test, validation)

    @property
    def device(self) -> str:
        """Where server, client and attacker run, as commands call it."""
        return str(self.backbone.device)

    @property
    def causal(self) -> nn.Module:
        return self.backbone.require_cut().causal

    def cut_as(self, cut: Cut) -> CutModel:
        """The model, cut as an arm wants it."""
        return CutModel.of(self.causal, cut)


def run(stage: Stage, arm: Arm, seed: int, *, selection: bool = False, attacked: bool = True) -> dict[str, Any]:
    """One run: trained, evaluated on test (for selection: validation, and never attacked), attacked."""
    began = time.perf_counter()
    questions = stage.validation if selection else stage.test
    result: dict[str, Any] = {"arm": arm.name, "method": arm.method, "options": arm.options, "seed": seed}
    result |= {"lr": arm.lr, "epochs": arm.epochs, "batch_size": BATCH, "cut": [arm.cut.bottom, arm.cut.top]}
    if stage.backbone.device.type == "cuda":
        result["device"] = torch.cuda.get_device_name(stage.backbone.device)
    work = WORK / f"{arm.name.replace('/', '_')}-seed{seed}"
    work.mkdir(parents=True, exist_ok=True)
    if arm.method == "zero-shot":
        result["utility"] = evaluate(stage.causal, CUT, questions)
    elif arm.method in ("full", "lora"):
        result["utility"] = evaluate(train_here(stage, arm, work, seed), CUT, questions)
    else:
        result |= train_over_the_wire(stage, arm, work, seed)
        result |= evaluate_tuned(stage, arm, work / "out", questions)
        result["weights_shared"] = weights_shared(stage, arm)
        print(f"  {describe({**result, 'seconds': time.perf_counter() - began})}", flush=True)
        if arm.attacks and attacked and not selection and not arm.emulated:
            names = None if arm.battery == "all" else QUICK
            result["attacks"] = attack_run(
                stage.cut_as(arm.cut), stage.tokenizer, work, names, sequences=arm.attacks, seed=seed
            )
    return {**result, "seconds": round(time.perf_counter() - began, 1)}


def train_over_the_wire(stage: Stage, arm: Arm, work: Path, seed: int) -> dict[str, Any]:
    """`blindtune serve --record` and `blindtune texts train`, in processes of their own; what the latter reports."""
    done = work / "train.json"
    if done.is_file():
        return json.loads(done.read_text())
    count = write_training(work / "train.jsonl", seed)
    serve = ["--cut", f"{arm.cut.bottom},{arm.cut.top}", "--device", stage.device]
    if arm.emulated:
        serve += ["--emulator", str(emulator(arm, stage.device))]
    common = ["--design", arm.method, "--batch-size", str(BATCH), "--lr", str(arm.lr), *tuning(arm)]
    common += ["--max-length", "96", "--validation", "0", "--training", f"seed={seed}"]
    common += ["--device", stage.device]
    for key, value in arm.options.items():
        common += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    told: dict[str, Any] = {}
    if arm.start:
        told["start"] = pretrain(stage, arm, seed, serve)
        common += ["--start", str(started(arm, seed) / "out")]
    with local_servers(MODEL, [work / "seen"], threads=1, more=serve) as (server,):
        steps = str(round(arm.epochs * -(-count // BATCH)))
        options, told_here = [*common, "--steps", steps], work / "reported.json"
        train(server.url, work / "train.jsonl", work / "out", told_here, options, work / "ground-truth.jsonl")
    result = {"train": reported(told_here), "train_examples": count, **told}
    done.write_text(json.dumps(result))
    return result


def tuning(arm: Arm) -> list[str]:
    """What of the ends is tuned, as `blindtune texts train` takes it."""
    return ["--tune", arm.tune, "--tune", f"rank={arm.rank}"]


def started(arm: Arm, seed: int) -> Path:
    """Where the bottom that an arm starts from is made; arms that begin alike share it."""
    return WORK / f"start-{arm.start}-weight-{arm.start_weight}-{arm.tune}-seed{seed}"


def pretrain(stage: Stage, arm: Arm, seed: int, serve: list[str]) -> dict[str, Any]:
    """Decorrelates a bottom on public text, through the provider's trunk."""
    work = started(arm, seed)
    if not (work / "train.json").is_file():
        work.mkdir(exist_ok=True)
        lines = [line for name in PUBLIC for line in read_lines(DATA / f"{name}.jsonl.gz") if len(line.split()) > 5]
        public = work / "public.jsonl"
        public.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines[seed::10][:4000]))
        options = ["--design", "online", "--task", "text", "--batch-size", str(BATCH)]
        options += ["--steps", str(arm.start), "--lr", "1e-3", *tuning(arm)]
        options += ["--max-length", "48", "--training", f"seed={seed}", "--validation", "0", "--device", stage.device]
        options += ["--set", f"decorrelation_weight={arm.start_weight}"]
        with local_servers(MODEL, [work / "seen"], threads=1, more=serve) as (server,):
            train(server.url, public, work / "out", work / "train.json", options)
    return reported(work / "train.json")


def reported(path: Path) -> dict[str, Any]:
    """What a command wrote, without the folder that it was run in."""
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "output"}


def train(
    url: str, data: Path, output: Path, report: Path, options: list[str], ground_truth: Path | None = None
) -> None:
    """The command, in a process of its own; goes on if it was interrupted."""
    arguments = ["--server", url, "--data", str(data), "--output", str(output), "--json", str(report), *options]
    if ground_truth is not None:
        arguments += ["--ground-truth", str(ground_truth)]
    if (output / "resume.safetensors").is_file():
        arguments.append("--resume")
    command("texts", "train", *arguments, log=output.parent / "train.log")


def command(*arguments: str, log: Path | None = None) -> None:
    """`blindtune` in a process of its own; raises `CalledProcessError`."""
    output = {} if log is None else {"stdout": log.open("w"), "stderr": subprocess.STDOUT}
    subprocess.run([sys.executable, "-m", "blindtune", *arguments], check=True, **output)


def emulator(arm: Arm, device: str = "cpu") -> Path:
    """Built once, with `blindtune emulator build`."""
    folder = WORK / (f"emulator-{arm.keep}" + (f"-{arm.distill}-steps" if arm.distill != DISTILL else ""))
    if not (folder / "manifest.json").is_file():
        arguments = ["--model", MODEL, "--cut", f"{CUT.bottom},{CUT.top}", "--keep", str(arm.keep), *DISTILLED]
        arguments += ["--steps", str(arm.distill), "--device", device]
        arguments += ["--key", str(WORK / "provider.pem"), "--output", str(folder), "--threads", "1"]
        for name in PUBLIC:
            arguments += ["--public", str(DATA / f"{name}.jsonl.gz")]
        command("emulator", "build", *arguments)
    return folder


def train_here(stage: Stage, arm: Arm, work: Path, seed: int) -> nn.Module:
    """All blocks, or LoRA on them, in this process: what nobody who hosts a model would hand out, as the reference."""
    count = write_training(work / "train.jsonl", seed)
    questions = questions_of(work / "train.jsonl", stage.tokenizer)
    causal = copy.deepcopy(stage.causal)
    layers = decoder_of(causal).layers
    if arm.method == "lora":
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = LoraConfig(r=arm.rank, lora_alpha=2 * arm.rank, target_modules="all-linear")
            inject_adapter_in_model(config, layers)
    blocks = [p for name, p in layers.named_parameters() if arm.method == "full" or ".lora_" in name]
    causal.requires_grad_(False)
    for parameter in blocks:
        parameter.requires_grad_()
    whole = _whole(causal)
    config = TrainConfig(steps=round(arm.epochs * -(-count // BATCH)), batch_size=BATCH, seed=seed)
    plan = BatchPlan([len(q.row) for q in questions], BATCH, seed)
    optimizer = torch.optim.AdamW(blocks, lr=arm.lr, weight_decay=0.0)
    for step in range(config.steps):
        chosen = [questions[i] for i in plan.batch(step)]
        batch = CausalBatch.of([q.row for q in chosen], [q.start for q in chosen])
        optimizer.zero_grad()
        loss = whole(batch.to(stage.backbone.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(blocks, config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = arm.lr * config.rate(step)
        optimizer.step()
        if step % 25 == 0:
            at = f"step {step} of {config.steps}"
            print(f"  {arm.method} seed {seed}: {at}, loss {float(loss.detach()):.3f}", flush=True)
    return causal


def _whole(causal: nn.Module) -> Any:
    def loss(batch: CausalBatch) -> torch.Tensor:
        mask = padding_mask(batch.lengths, batch.ids.shape[1])
        logits = causal(input_ids=batch.ids, attention_mask=mask).logits[batch.learned]
        return nn.functional.cross_entropy(logits, batch.ids[:, 1:][batch.learned[:, :-1]])

    return loss


def evaluate_tuned(stage: Stage, arm: Arm, out: Path, questions: dict[str, list[TokenizedQuestion]]) -> dict[str, Any]:
    """Tuned ends around the real trunk, as the design will use it; for Offline also around the emulator.

    Checkpoints hold their start; those that were trained before they did, with `start`, have to be trained again.
    """
    base = stage.cut_as(arm.cut)
    whole = with_tuned_parts(base, *read_tuned_parts(out))
    design = make_design(arm.method, arm.options)
    if not design.emulated:
        return {"utility": evaluate(whole, arm.cut, questions, wire_of(design, base.parts["bottom"]))}
    stand_in = load_emulator(emulator(arm)).part().to(stage.backbone.device)
    untuned = around(base.causal, stand_in)
    bottom, top, tuned = (copy.deepcopy(part) for part in (base.parts["bottom"], base.parts["top"], stand_in))
    merge_checkpoint(Ends(bottom, top, parts=(), emulator=tuned), out)
    with_emulator = around(whole, tuned)
    return {
        "utility": evaluate(whole, CUT, questions),
        "emulator_utility": evaluate(with_emulator, CUT, questions),
        "emulator_untuned": evaluate(untuned, CUT, questions),
    }


def wire_of(design: Design, bottom: Part) -> Wire:
    """What a design does between the parts."""
    generator = SecureGenerator(bytes(32))
    return Wire(
        lambda hidden: through_codec(design.up, design.perturb(hidden, generator)),
        lambda hidden: through_codec(design.down, hidden),
        design.encoder(bottom),
    )


def around(causal: nn.Module, stand_in: Part, cut: Cut = CUT) -> nn.Module:
    """A copy of a model with an emulator's blocks in the place of its trunk's; ends are shared."""
    result = copy.copy(causal)
    result._modules = dict(causal._modules)
    decoder = copy.copy(decoder_of(causal))
    decoder._modules = dict(decoder._modules)
    own, theirs = decoder_of(causal).layers, decoder_of(stand_in.causal).layers
    trunk = range(cut.bottom, len(own) - cut.top)
    decoder.layers = nn.ModuleList(theirs[i] if i in trunk else own[i] for i in range(len(own)))
    result.model = decoder  # of llama and its like
    return result


def evaluate(
    causal: nn.Module,
    cut: Cut,
    questions: dict[str, list[TokenizedQuestion]],
    wire: Wire | None = None,
) -> dict[str, Any]:
    """For each task the questions that were answered well, as a row of 0 and 1: `accuracy`, `accuracy_norm`."""
    result: dict[str, Any] = {}
    for task, some in questions.items():
        found = hits(some, score_questions(causal, cut, some, wire=wire))
        result[task] = {metric: "".join(map(str, row)) for metric, row in found.items()}
    return result


def mean_accuracy(utility: dict[str, Any], metric: str = "accuracy") -> float:
    """Over the tasks."""
    rates = [[int(c) for c in rows[metric]] for rows in utility.values()]
    return sum(sum(rate) / len(rate) for rate in rates) / len(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", default=MAIN)
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--attack-seeds", help="of --seeds, those to attack; the others tell utility only")
    parser.add_argument("--selection", action="store_true", help="on validation questions, not attacked")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--whole-test", action="store_true", help="on all test questions, not 250 of each task")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = RESULTS / ("selection" if options.selection else WHOLE_TEST if options.whole_test else "")
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(Arm.parse(arm), int(seed)) for seed in options.seeds.split(",") for arm in options.arms.split(",")]
    jobs = [(arm, seed) for arm, seed in jobs if not (folder / f"{arm.name}-seed{seed}.json").exists()]
    attacked = (options.attack_seeds or options.seeds).split(",")
    stage = Stage.set(options.device, None if options.whole_test else TEST_EACH) if jobs else None
    for arm, seed in jobs:
        assert stage is not None
        result = run(stage, arm, seed, selection=options.selection, attacked=str(seed) in attacked)
        (folder / f"{arm.name}-seed{seed}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(describe(result), flush=True)


def weights_shared(stage: Stage, arm: Arm) -> float:
    """Part of the provider's weights that the client gets, by number: of the ends, and with an emulator's blocks."""
    cut_model = stage.cut_as(arm.cut)
    ends = cut_model.weights_shared()
    if not arm.emulated:
        return ends
    whole = sum(t.numel() for part in cut_model.parts.values() for t in part.weights().values())
    return ends + load_emulator(emulator(arm)).manifest.parameters / whole


def describe(result: dict[str, Any]) -> str:
    """One line."""
    by_task = ", ".join(f"{task} {mean_accuracy({task: rows}):.3f}" for task, rows in result["utility"].items())
    line = f"{result['arm']} seed {result['seed']}: accuracy {mean_accuracy(result['utility']):.3f} ({by_task})"
    if "emulator_utility" in result:
        line += f", emulator {mean_accuracy(result['emulator_utility']):.3f}"
    for attacker, found in result.get("attacks", {}).items():
        best = max((a for a in found if not a["floor"]), key=lambda a: a["accuracy"][0], default=None)
        if best:
            line += f", {attacker} {best['attack']} {best['accuracy'][0]:.2f}"
    return f"{line}, {result['seconds']:.0f} s"


if __name__ == "__main__":
    main()
