"""Accuracy of padded LoRA against its budget μ and the size of its pads: table and figure of docs/labels/results.md.

python -m experiments.labels.run sst2 --selection --no-audit --arms $(python -m experiments.labels.budget --arms)
python -m experiments.labels.budget

Half an epoch of SST-2, scored on the validation sentences; nothing here is reported on the test split.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from experiments.figures import fill, header
from experiments.labels.figures import PAGE, plt, save, span
from experiments.labels.run import RESULTS

BUDGETS = (0.05, 0.25, 2.5)
SPREADS = (0.02, 0.05, 0.16)
SEEDS = (1, 2, 3)
FOLDER = RESULTS / "selection" / "sst2"
LORA = "lora+epochs=0.5"


def arm(budget: float, spread: float) -> str:
    return f"padded-lora+epochs=0.5+max_mu={budget}+pad_spread={spread}"


def runs(name: str) -> list[dict[str, Any]]:
    paths = [Path(FOLDER / f"{name}-seed{seed}.json") for seed in SEEDS]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def accuracies(name: str) -> list[float]:
    return [run["validation"]["accuracy"] for run in runs(name)]


def table() -> str:
    lines = header("pad_spread", *(f"μ = {budget:g}" for budget in BUDGETS))
    for spread in SPREADS:
        cells = [span(accuracies(arm(budget, spread)), 3) for budget in BUDGETS]
        lines.append(f"| {spread:g} | {' | '.join(cells)} |")
    counts = sorted({len(runs(arm(budget, spread))) for budget in BUDGETS for spread in SPREADS})
    seeds = " or ".join(map(str, counts)) + (" seed" if counts == [1] else " seeds")
    lines += [
        "",
        f"Mean (range) of validation accuracy over {seeds}; plain LoRA in the same setting "
        f"{span(accuracies(LORA), 3)}. The standard error of one accuracy is .013. "
        "`python -m experiments.labels.budget` makes this table and the figure.",
    ]
    return "\n".join(lines)


def picture() -> Any:
    figure, axis = plt.subplots(figsize=(5.2, 3.4))
    lora = accuracies(LORA)
    axis.axhline(float(np.mean(lora)), color="#c53030", linewidth=1, label="plain LoRA, no privacy")
    for spread, colour in zip(SPREADS, ("#2b6cb0", "#6b46c1", "#b7791f"), strict=True):
        found = [accuracies(arm(budget, spread)) for budget in BUDGETS]
        means = [float(np.mean(values)) for values in found]
        axis.plot(BUDGETS, means, marker="o", color=colour, label=f"pads of {spread:g}")
        axis.vlines(BUDGETS, [min(v) for v in found], [max(v) for v in found], color=colour, alpha=0.4)
    axis.set_xscale("log")
    axis.set_xticks(BUDGETS, [f"{budget:g}" for budget in BUDGETS])
    axis.minorticks_off()
    axis.set_xlabel("μ of everything that one operator sees (smaller is more private)")
    axis.set_ylabel("validation accuracy, SST-2")
    axis.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    return figure


def main() -> None:
    if "--arms" in sys.argv:
        print(",".join([LORA, *(arm(budget, spread) for budget in BUDGETS for spread in SPREADS)]))
        return
    fill(PAGE, "budget", table())
    save(picture(), "accuracy-and-mu")


if __name__ == "__main__":
    main()
