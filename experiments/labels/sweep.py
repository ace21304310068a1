"""P3EFT's settings: scale × adversary × weight, with rates chosen on validation, and what it is held against.

python -m experiments.labels.sweep TASK [--seeds 1,2,3] [--epochs 2] [--rates 1e-3] [--workers 2] [--only PART]

First the learning rate of each scale is chosen: without an adversary, on seed 1, by validation accuracy. Then each arm
is trained, evaluated on test, and scored by the paper's measures, on activations, shifts and differences. Gradients
travel in one piece, which trains the same at half of the cost. One JSON file for each run; finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from experiments.labels.run import RESULTS, Arm, Job, do
from experiments.labels.tasks import TASKS

FOLDER = RESULTS / "sweep"
SCALES = (1.0, 5.0, 31.0, 100.0)
WEIGHTS = (0.0, 0.1, 0.31, 1.0)
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
ADVERSARIES = {
    "flip": "regularizer=flip+adversary_fit=batch+adversary_l2=1",
    "confusion": "regularizer=confusion+adversary_fit=buffer",
}
"""The authors' loss with their fit, and ours with ours."""
CORRELATION = ("unbiased", "biased")
CORRELATION_WEIGHTS = (0.01, 0.03, 0.1, 0.3, 1.0)
COMMON = "first=4"


def p3eft(scale: float, weight: float, form: str, rate: float, epochs: float) -> str:
    """The name of an arm with the same weight on activations and shifts."""
    weights = f"activation_weight={weight}+shift_weight={weight}"
    return f"p3eft+m=1+mixing_scale={scale}+{weights}+{ADVERSARIES[form]}+lr={rate}+epochs={epochs}+{COMMON}"


def selection(epochs: float, rates: Sequence[float] = RATES) -> list[str]:
    """Arms without an adversary, one for each scale and rate; none if there is nothing to choose."""
    return [p3eft(scale, 0.0, "flip", rate, epochs) for scale in SCALES for rate in rates if len(rates) > 1]


def chosen_rates(folder: Path, epochs: float, rates: Sequence[float]) -> dict[float, float]:
    """Scale -> the rate with the best validation accuracy on seed 1; of equal ones, with the smallest loss."""

    def score(scale: float, rate: float) -> tuple[float, float]:
        run = json.loads((folder / f"{p3eft(scale, 0.0, 'flip', rate, epochs)}-seed1.json").read_text())
        return run["validation"]["accuracy"], -run["validation"]["loss"]

    if len(rates) == 1:
        return dict.fromkeys(SCALES, rates[0])
    return {scale: max(rates, key=lambda rate: score(scale, rate)) for scale in SCALES}


def arms(rates: dict[float, float], epochs: float) -> list[str]:
    """All arms; without a weight there is no adversary, and so one arm for both."""
    names = [
        p3eft(scale, weight, form, rates[scale], epochs)
        for scale in SCALES
        for weight in WEIGHTS
        for form in ADVERSARIES
        if weight or form == "flip"
    ]
    against = [
        f"distance-correlation+activation_weight={weight}+estimator={estimator}+epochs={epochs}+{COMMON}"
        for estimator in CORRELATION
        for weight in CORRELATION_WEIGHTS
    ]
    return [*names, f"lora+epochs={epochs}+{COMMON}", *against]


def jobs(folder: Path, names: list[str], seeds: list[int], *, selection: bool = False) -> list[Job]:
    return [
        Job(folder / f"{name}-seed{seed}.json", Arm.parse(name), seed, selection, "none" if selection else "paper")
        for seed in seeds
        for name in names
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="to choose from")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="arms whose name contains this")
    parser.add_argument("--count", action="store_true", help="count the runs that are left, and do none")
    options = parser.parse_args()
    first, folder = FOLDER / "selection" / options.task, FOLDER / options.task
    seeds = [int(seed) for seed in options.seeds.split(",")]
    rates = [float(rate) for rate in options.rates.split(",")]
    selected = jobs(first, selection(options.epochs, rates), [1], selection=True)
    if options.count:
        names = arms(dict.fromkeys(SCALES, RATES[0]), options.epochs)
        left = sum(not job.path.exists() for job in selected)
        print(f"{left} runs for selection, {len(names)} arms of {len(seeds)} seeds in all")
        return
    do(options.task, selected, options.workers)
    chosen = chosen_rates(first, options.epochs, rates)
    names = [name for name in arms(chosen, options.epochs) if options.only in name]
    do(options.task, jobs(folder, names, seeds), options.workers)


if __name__ == "__main__":
    main()
