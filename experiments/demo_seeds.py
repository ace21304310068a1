"""A longer demo over several seeds: accuracy beside the best attack, mean and range. Finished seeds are kept.

python -m experiments.demo_seeds [SEED ...]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "demo"
PUBLISHED = ("spectral", "norm", "k-means")
SOME_LABELS = "64 labels"
SEEDS = (1, 2, 3)
"""Seed 0 was used for tuning."""
LONGER = (
    *("--train", "4800", "--test", "1500", "--steps", "150"),
    *("--points", "5", "--attacked", "800", "--decoder", ""),
)
"""The defaults of `blindtune demo` are shorter, so that it takes three minutes."""


def run(seed: int) -> dict[str, Any]:
    """One demo; reads its JSON if it was run before."""
    path = RESULTS / f"seed-{seed}.json"
    if not path.exists():
        RESULTS.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "blindtune", "demo", "--cache", ".cache", "--output", f"out/demo-{seed}"]
        subprocess.run([*command, *LONGER, "--seed", str(seed), "--json", str(path)], check=True)
    return json.loads(path.read_text())


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "min": min(values), "max": max(values)}


def numbers(method: dict[str, Any]) -> dict[str, float]:
    """A method's numbers of one run, with the best of the published attacks and the probe with 64 labels as such."""
    by_attack, probes = method["activations_and_shifts_auc_by_attack"], method["few_label_auc"]
    found = {key: value for key, value in method.items() if isinstance(value, float)}
    found["published_attacks_auc"] = max(by_attack[name] for name in PUBLISHED)
    return found | {"few_label_auc": probes[SOME_LABELS]}


def main() -> None:
    seeds = [int(argument) for argument in sys.argv[1:]] or list(SEEDS)
    runs = [run(seed) for seed in seeds]
    summary: dict[str, Any] = {"seeds": seeds, "features_accuracy": spread([r["features"]["accuracy"] for r in runs])}
    for method in ("lora", "padded-lora"):
        found = [numbers(r["methods"][method]) for r in runs]
        summary[method] = {key: spread([n[key] for n in found]) for key in found[0]}
    summary["frozen_few_label_auc"] = spread([r["frozen_few_label_auc"][SOME_LABELS] for r in runs])
    summary["frozen_attack_auc"] = spread([r["frozen_attack_auc"] for r in runs])
    summary["accuracy_lost"] = spread(
        [r["methods"]["lora"]["accuracy"] - r["methods"]["padded-lora"]["accuracy"] for r in runs]
    )
    (RESULTS / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
