"""What consecutive adapters tell over a whole run, and what the two alternatives of P3EFT's section 3.2 change.

python -m experiments.labels.inversion [--arms shares,moments,turns,noise,distance-correlation] [--seeds 1,2]

LoRA (and distance correlation) with gradients in two shares, so that nobody sees a gradient; one operator inverts the
optimizer's steps, at the beginning of the run and in each third of it. Writes
`experiments/results/labels/inversion.json`; what is in it is kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blindtune.audit import Recomputation, read_view
from blindtune.audit.channels import inverted
from blindtune.audit.labels import UPDATE_ATTACKS
from blindtune.audit.labels.run import label_rows
from blindtune.audit.observe import Update, View
from blindtune.audit.statistics import best_auc
from blindtune.labels import make_method
from blindtune.labels.trainer import TrainConfig, Trainer
from blindtune.wire import Transcript
from experiments.labels.run import RESULTS, Stage, evaluate, make_model, run_steps, set_stage

UPDATES = 8
"""To invert at each moment; their texts are attacked together."""
ARMS: dict[str, dict[str, Any]] = {
    "shares": {},
    "moments": {"random_adam_moments": 0.1},
    "turns": {"operators": 4},
    "noise": {"adapter_noise": 0.01},
    "distance-correlation": {"method": "distance-correlation"},
}


def run(stage: Stage, arm: str, seed: int) -> dict[str, Any]:
    """Trains, and attacks what the first operator recorded."""
    settings = ARMS[arm]
    work = Path(tempfile.mkdtemp(prefix="blindtune-"))
    folders = [work / str(operator) for operator in range(int(settings.get("operators", 2)))]
    try:
        options = {"m": 2, "adapter_noise": settings.get("adapter_noise", 0.0)}
        method = make_method(settings.get("method", "lora"), options)
        model = make_model(stage, method, folders, method.default_rank, seed)
        config = TrainConfig(
            steps=stage.task.steps,
            seed=seed,
            learning_rate=method.default_lr,
            random_adam_moments=settings.get("random_adam_moments", 0.0),
        )
        trainer = Trainer(model, stage.train, config)
        trainer.prepare()
        run_steps(trainer, f"{arm} seed {seed}")
        result: dict[str, Any] = {**settings, "test": evaluate(model, stage.test)}
        model.backbone.pool.close()
        view = read_view(Transcript(folders[0]), "A")
        return {**result, "auc": invert(view, stage)}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def invert(view: View, stage: Stage) -> dict[str, float]:
    """AUC by moment and attack; no entry where the operator saw no update to invert."""
    labels = label_rows(stage.train.texts, stage.train.labels, [view], stage.backbone)
    recompute = Recomputation(stage.backbone)
    updates = view.updates()
    moments: dict[str, tuple[str, list[Update]]] = {
        "first steps, Adam": ("update inverted, Adam", updates[:UPDATES]),
        "first steps": ("update inverted", updates[:UPDATES]),
    }
    thirds = np.array_split(np.arange(len(updates)), 3)
    for name, third in zip(("first third", "second third", "last third"), thirds, strict=True):
        chosen = third[np.linspace(0, len(third) - 1, UPDATES).round().astype(int)] if len(third) else []
        moments[name] = ("update inverted", [updates[i] for i in chosen])
    found: dict[str, float] = {}
    for name, (attack, some) in moments.items():
        if not some:
            continue
        features, rows = inverted(view, recompute, UPDATE_ATTACKS[attack], some, labels)
        found[name] = round(best_auc(features, np.array([labels[row] for row in rows]), symmetric=True)[0], 4)
        print(f"  {name}: {found[name]:.3f} of {len(rows)} texts", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default="1,2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "inversion.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    stage: Stage | None = None
    for seed in options.seeds.split(","):
        for arm in options.arms.split(","):
            if seed in found.get(arm, {}):
                continue
            stage = stage or set_stage("sst2")
            found.setdefault(arm, {})[seed] = run(stage, arm, int(seed))
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{arm} seed {seed}: {found[arm][seed]}", flush=True)


if __name__ == "__main__":
    main()
