"""What gradients tell, in the clear and in shares: the paper's Figures 1 and 3, and its test with XGBoost.

python -m experiments.labels.gradients [--task sst2] [--seeds 1,2,3]

Plain LoRA is trained twice from the same start: gradients to one operator in the clear, and in two shares with noise of
standard deviation 1000 C to two operators. Writes `experiments/results/labels/gradients.json`; seeds that are in it
are kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xgboost
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from blindtune.audit.labels import ATTACKS, Channel
from blindtune.audit.statistics import auc, best_auc
from blindtune.labels import LinearHead, LoRA, PrivateBackpropOptions, PrivateModel
from blindtune.labels.trainer import TrainConfig, Trainer
from blindtune.models import LoraLayout
from blindtune.models.tokenizer import TokenRow
from blindtune.privacy.randomness import SecureGenerator
from blindtune.privacy.shares import clip_per_example, split_gradient
from blindtune.wire import Transcript
from experiments.labels.run import RESULTS, Stage, make_model, operator_folders, set_stage

CLIP, RATIO = 10.0, 1000.0
DRAWN, MEASURED = 400, 600
Features = NDArray[np.float32]


@dataclass
class Moment:
    """A trained state: adapter `(1, P)` and a copy of the head."""

    step: int
    weights: Tensor
    head: LinearHead


@dataclass
class Run:
    """One training, with three of its states and what operators recorded."""

    losses: list[float]
    moments: list[Moment]
    folders: list[Path]
    model: PrivateModel


def train(stage: Stage, seed: int, work: Path, *, private: bool) -> Run:
    """Plain LoRA; `private`: gradients in two shares over two operators."""
    m = 2 if private else 1
    folders = operator_folders(work / ("private" if private else "normal"), m)
    method = LoRA(PrivateBackpropOptions(m=m, clip_norm=CLIP, noise_ratio=RATIO))
    model = make_model(stage, method, folders, LoRA.default_rank, seed)
    backbone = model.backbone
    trainer = Trainer(model, stage.train, TrainConfig(steps=stage.task.steps, seed=seed))
    trainer.prepare()
    looks = {1, stage.task.steps // 4, stage.task.steps}
    losses: list[float] = []
    moments: list[Moment] = []
    for step in trainer.steps():
        losses.append(step.losses["task"])
        if step.step in looks:
            copied = LinearHead(backbone.hidden_size, len(stage.train.classes))
            copied.load_state_dict(model.head.state_dict())
            moments.append(Moment(step.step, backbone.lora_adapters()[0].vector().detach()[None].clone(), copied))
    backbone.pool.close()
    return Run(losses, moments, folders, model)


def true_gradients(run: Run, moment: Moment, rows: Sequence[TokenRow], labels: Tensor, stage: Stage) -> dict[str, Any]:
    """Activations `(N, d)`, gradients of each text's own loss at them, and the share of them that isn't noise alone."""
    layout = run.model.backbone.lora_adapters()[0].layout
    parts: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(rows), 32):
            tokens = run.model.backbone.tokenizer.pad(rows[start : start + 32])
            parts.append(stage.backbone.forward(tokens, run.model.backbone.readout, layout, moment.weights)[0])
    hidden = torch.cat(parts).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(moment.head(hidden), labels, reduction="sum"), hidden)
    clipped = clip_per_example(gradient[None], CLIP)
    split = split_gradient(clipped, 2, RATIO * CLIP, generator=SecureGenerator())
    share = split.shares[split.carrier, 0]  # the one that depends on the gradient
    return {"activations": hidden.detach().numpy(), "gradients": gradient.numpy(), "shares": share.float().numpy()}


def parameter_gradients(
    run: Run, moment: Moment, rows: Sequence[TokenRow], cotangents: Features, stage: Stage, module: str
) -> Features:
    """J_bᵀ c_b of each text alone, for the A and B of one module: `(N, p)`. J_b is the text's, whatever c_b is."""
    layout: LoraLayout = run.model.backbone.lora_adapters()[0].layout
    found: list[Features] = []
    for row, cotangent in zip(rows, cotangents, strict=True):
        weights = moment.weights.clone().requires_grad_()
        tokens = run.model.backbone.tokenizer.pad([row])
        hidden = stage.backbone.forward(tokens, run.model.backbone.readout, layout, weights)
        (gradient,) = torch.autograd.grad(hidden, weights, torch.tensor(cotangent)[None, None])
        a, b = layout.split(gradient[0])[module]
        found.append(torch.cat([a.flatten(), b.flatten()]).numpy())
    return np.stack(found)


def unsupervised(features: Features, labels: NDArray[np.int64]) -> float:
    """The best of the attacks that know no label."""
    channel = Channel(features, len(np.unique(labels)))
    tried = [attack.run(channel, labels) for attack in ATTACKS.values() if attack.unsupervised]
    return max(best_auc(scores, labels, symmetric=True)[0] for scores in tried if scores is not None)


def boosted(features: Features, labels: NDArray[np.int64], seed: int) -> dict[str, float]:
    """XGBoost with its default hyperparameters: fitted on 70%, scored on a balanced part of the rest."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    cut = int(0.7 * len(labels))
    known, rest = order[:cut], order[cut:]
    smallest = min(int((labels[rest] == label).sum()) for label in np.unique(labels))
    held = np.concatenate([rest[labels[rest] == label][:smallest] for label in np.unique(labels)])
    model = xgboost.XGBClassifier(random_state=seed, n_jobs=2).fit(features[known], labels[known])
    return {
        "train_accuracy": float((model.predict(features[known]) == labels[known]).mean()),
        "test_accuracy": float((model.predict(features[held]) == labels[held]).mean()),
        "test_auc": auc(model.predict_proba(features[held])[:, 1].astype(np.float64), labels[held] == labels.max()),
        "test_examples": len(held),
    }


def received(folder: Path) -> dict[tuple[int, ...], Features]:
    """The first cotangent that an operator received for each text."""
    transcript, found = Transcript(folder), {}
    for event in transcript.events:
        if event.kind == "backward":
            tensors = transcript.tensors(event)
            for ids, length, vector in zip(
                tensors["input_ids"].tolist(), tensors["lengths"].tolist(), tensors["cotangents"][0, 0], strict=True
            ):
                found.setdefault(tuple(ids[:length]), vector.float().numpy())
    return found


def plane(features: Features, labels: NDArray[np.int64]) -> dict[str, Any]:
    """Two principal components of the first `DRAWN` rows, what an attack reads from all, for a picture."""
    points = Channel(features).components(2)[:DRAWN]
    scale = np.abs(points).max(0)
    return {
        "points": np.round(points / np.where(scale > 0, scale, 1), 3).tolist(),
        "labels": labels[:DRAWN].tolist(),
        "auc": round(unsupervised(features, labels), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--seeds", default="1,2,3")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stage = set_stage(options.task)
    work = Path(tempfile.mkdtemp(prefix="blindtune-"))
    result: dict[str, Any] = {
        "task": options.task,
        "noise_ratio": RATIO,
        "clip_norm": CLIP,
        "xgboost": [],
        "losses": {},
    }
    path = RESULTS / "gradients.json"
    if path.exists():
        result = json.loads(path.read_text())
    try:
        for seed in (int(seed) for seed in options.seeds.split(",")):
            if str(seed) in result["losses"]:
                continue
            normal, private = (train(stage, seed, work, private=private) for private in (False, True))
            print(f"seed {seed}: trained twice", flush=True)
            difference = np.abs(np.array(normal.losses) - np.array(private.losses))
            result["losses"][str(seed)] = {
                "normal": [round(x, 4) for x in normal.losses], "private": [round(x, 4) for x in private.losses],
                "largest_difference": float(difference.max()), "mean_difference": float(difference.mean()),
            }  # fmt: skip
            rows = private.model.backbone.rows(stage.train.texts)
            truth = {row.ids: label for row, label in zip(rows, stage.train.labels, strict=True)}
            for name, run in (("gradients in the clear", normal), ("one operator's shares", private)):
                by_text = received(run.folders[0])
                labels = np.array([truth[ids] for ids in by_text])
                entry = boosted(np.stack(list(by_text.values())), labels, seed)
                result["xgboost"].append({"seed": seed, "of": name, **entry})
                print(result["xgboost"][-1], flush=True)
            rng = np.random.default_rng(seed)
            measured = rng.permutation(len(rows))[:MEASURED]
            chosen, labels = [rows[i] for i in measured], np.array([stage.train.labels[i] for i in measured])
            module = private.model.backbone.lora_adapters()[0].layout.shapes[-1][0]
            for moment in normal.moments if seed == 1 else normal.moments[-1:]:
                vectors = true_gradients(normal, moment, chosen, torch.tensor(labels), stage)
                vectors["noise"] = RATIO * CLIP * rng.standard_normal(vectors["shares"].shape).astype(np.float32)
                for name, source in (("normal", "gradients"), ("private", "shares"), ("noise alone", "noise")):
                    vectors[f"parameter gradients, {name}"] = parameter_gradients(
                        normal, moment, chosen, vectors[source], stage, module
                    )
                if seed == 1:
                    result.setdefault("pictures", {})[moment.step] = {
                        name: plane(features, labels) for name, features in vectors.items()
                    }
                    print({k: v["auc"] for k, v in result["pictures"][moment.step].items()}, flush=True)
                if moment is normal.moments[-1]:
                    for name in ("normal", "private", "noise alone"):
                        entry = boosted(vectors[f"parameter gradients, {name}"], labels, seed)
                        result["xgboost"].append({"seed": seed, "of": f"parameter gradients, {name}", **entry})
                        print(result["xgboost"][-1], flush=True)
            path.write_text(json.dumps(result) + "\n")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
