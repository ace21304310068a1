"""False alarms and found leaks on a real transcript: real channels, labels that are drawn anew.

python -m experiments.labels.alarms [--runs 1000]

Padded LoRA is trained on SST-2 over two operators. Attacks without labels score what both recorded; their scores
don't depend on labels, so each of the runs draws labels and takes the permutation test of the maximum over all of them.
*Null*: the true labels, shuffled. *Planted*: labels that one attack's score on one channel at one look, drawn for each
run, tells with an AUC of 0.65. An alarm is a p-value of at most 0.05: a permutation test is exact, so that 5% of the
nulls are expected to raise one; how many do at 0.025 is told beside it. Writes
`experiments/results/labels/alarms.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm, rankdata

from blindtune.audit import Plan, Recomputation, attack_view, read_view
from blindtune.audit.labels.run import label_rows
from blindtune.audit.statistics import CachedScores, best_auc, chance_of_maximum
from blindtune.labels import PaddedLoRA
from blindtune.labels.trainer import TrainConfig, Trainer
from blindtune.wire import Transcript
from experiments.audit_power import LEAK, LEVEL, PERMUTATIONS, share
from experiments.labels.run import LOOKS, RESULTS, make_model, operator_folders, run_steps, set_stage

TEXTS = 1000


def scores() -> tuple[list[CachedScores], dict[object, int]]:
    """Of all attacks without labels on both operators; true labels."""
    stage = set_stage("sst2")
    work = Path(tempfile.mkdtemp(prefix="blindtune-"))
    try:
        method = PaddedLoRA(steps=stage.task.steps)
        folders = operator_folders(work, method.m)
        model = make_model(stage, method, folders, PaddedLoRA.default_rank, 1)
        trainer = Trainer(
            model, stage.train, TrainConfig(steps=stage.task.steps, learning_rate=PaddedLoRA.default_lr, seed=1)
        )
        trainer.prepare()
        run_steps(trainer, "padded-lora")
        model.backbone.pool.close()
        views = [read_view(Transcript(folder), name) for folder, name in zip(folders, "AB", strict=True)]
        known = label_rows(stage.train.texts, stage.train.labels, views, stage.backbone)
        some = dict(sorted(known.items(), key=lambda item: hash(item[0]))[:TEXTS])
        recompute = Recomputation(stage.backbone)
        attacked = [attack_view(view, Plan(some, LOOKS, 1, control=False), recompute) for view in views]
        cached = [entry for result in attacked for entry in result.cached]
        return cached, {row: label for result in attacked for row, label in result.labels.items()}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def correlation(auc: float) -> float:
    """Of two normal variables, so that one tells the other's sign with this AUC; by simulation."""
    random = np.random.default_rng(0)
    z, noise = random.normal(size=(2, 200_000))

    def found(rho: float) -> float:
        sign = rho * z + np.sqrt(1 - rho**2) * noise > 0
        return best_auc(z[:, None], sign.astype(np.int64), symmetric=False)[0]

    low, high = 0.0, 0.99
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if found(middle) < auc else (low, middle)
    return low


def planted(entry: CachedScores, rows: Sequence[object], rho: float, random: np.random.Generator) -> dict[object, int]:
    """Labels that one attack's first score tells with some AUC; those of other texts are drawn."""
    told: NDArray[np.float64] = norm.ppf((rankdata(entry.scores[:, 0]) - 0.5) / len(entry.rows))
    drawn = rho * told + np.sqrt(1 - rho**2) * random.normal(size=len(told)) > 0
    labels = {row: int(value) for row, value in zip(rows, random.integers(0, 2, len(rows)), strict=True)}
    return labels | {row: int(value) for row, value in zip(entry.rows, drawn, strict=True)}


def alarms(found: dict[str, list[float]], level: float) -> dict[str, Any]:
    """Part of the runs of each kind whose p-value is at most `level`."""
    return {name: share(sum(p <= level for p in values), len(values)) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    cached, labels = scores()
    rows, rho = list(labels), correlation(LEAK)
    print(f"{len(cached)} attacks at looks, {len(rows)} texts; correlation {rho:.3f}", flush=True)
    found: dict[str, list[float]] = {"null": [], "planted": []}
    for run in range(runs):
        random = np.random.default_rng(run)
        shuffled = dict(zip(rows, random.permutation(list(labels.values())).tolist(), strict=True))
        entry = cached[int(random.integers(len(cached)))]
        for name, chosen in (("null", shuffled), ("planted", planted(entry, rows, rho, random))):
            found[name].append(chance_of_maximum(cached, chosen, permutations=PERMUTATIONS, seed=run).p)
        if run % 20 == 19:
            print(f"  {run + 1} runs: {alarms(found, LEVEL)}", flush=True)
    result = {str(level): alarms(found, level) for level in (LEVEL, LEVEL / 2)}
    result |= {"planted_auc": LEAK, "texts": len(rows), "scores": sum(entry.scores.shape[1] for entry in cached)}
    (RESULTS / "alarms.json").write_text(json.dumps(result, indent=1) + "\n")
    print(result)


if __name__ == "__main__":
    main()
