"""Fills the four rows of results in the README from committed JSON.

python -m experiments.readme
"""

from __future__ import annotations

import numpy as np

from experiments.figures import ROOT, fill, header
from experiments.labels.figures import Arm, accuracy, any_leak, chance, load
from experiments.texts.figures import UNDEFENDED, arms, average

TASKS = {"sst2": "SST-2", "mrpc": "MRPC", "trec": "TREC"}
OURS = "padded-lora+epochs=2+lr=0.001+warmup=60"
OFFLINE = "offline+tune_emulator=true"


def rows() -> str:
    """Three tasks with private labels, and four question-answering tasks with private texts."""
    lines = header(
        "", "unprotected", "nothing sent about labels", "blindtune",
        "what one server learned: unprotected → blindtune (texts alone)",
    )  # fmt: skip
    for task, name in TASKS.items():
        found = load(task)
        lora, ours = found["lora"], found[OURS]
        leaks = [float(np.mean(arm.values(any_leak))) for arm in (lora, ours)]
        floor = float(np.mean(ours.values(chance)))
        lines.append(
            f"| labels of {name}, MiniLM | LoRA {np.mean(lora.values(accuracy)):.3f} | {nothing_sent(found)} "
            f"| padded LoRA {np.mean(ours.values(accuracy)):.3f} "
            f"| AUC of the best attack {leaks[0]:.2f} → {leaks[1]:.2f} ({floor:.2f}) |"
        )
    texts = arms()
    undefended, offline = texts[UNDEFENDED], texts[OFFLINE]
    best = undefended.best_attack
    read = 0.0 if best is None else best["accuracy"][0]
    lines.append(
        f"| texts of four QA tasks, SmolLM2 | split learning {average(undefended):.3f} | – "
        f"| offline {average(offline):.3f} | tokens read {read:.0%} → none is sent |"
    )
    note = (
        "Accuracy on test texts, means over seeds. In brackets: the same attacks on what knows no labels,\n"
        "which is what texts tell by themselves. [Labels](docs/labels/results.md),\n[texts](docs/texts/results.md)."
    )
    return "\n".join([*lines, "", note])


def nothing_sent(found: dict[str, Arm]) -> str:
    """Accuracy of the methods that send nothing about labels."""
    shown = [f"{name} {np.mean(found[name].values(accuracy)):.3f}" for name in ("features", "side") if name in found]
    return ", ".join(shown) or "–"


if __name__ == "__main__":
    fill(ROOT / "README.md", "rows", rows())
