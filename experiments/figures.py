"""Fills the tables of docs/benchmarks.md from committed JSON, so that no number is typed by hand.

python -m experiments.figures
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"


def read(path: str) -> Any:
    return json.loads((ROOT / path).read_text())


def span(numbers: dict[str, float], digits: int = 2) -> str:
    return f"{numbers['mean']:.{digits}f} ({numbers['min']:.{digits}f}–{numbers['max']:.{digits}f})"


def header(*columns: str) -> list[str]:
    """The first two lines of a table."""
    return ["|" + "|".join(f" {column} " if column else " " for column in columns) + "|", "|" + "---|" * len(columns)]


def demo_table() -> str:
    """Mean and range over seeds."""
    summary = read("experiments/results/demo/summary.json")
    attacked = ("spectral, norm, k-means", "all without labels", "gradients", "64 known labels")
    lines = [
        *header("", "test accuracy", *attacked, "μ", "ε"),
        f"| features | {span(summary['features_accuracy'], 3)} | – | {span(summary['frozen_attack_auc'])} | – "
        f"| {span(summary['frozen_few_label_auc'])} | – | – |",
    ]
    for method, name in (("lora", "plain LoRA"), ("padded-lora", "padded LoRA")):
        n = summary[method]
        mu, epsilon = (span(n[name]) if name in n else "none" for name in ("mu", "epsilon"))
        lines.append(
            f"| {name} | {span(n['accuracy'], 3)} | {span(n['published_attacks_auc'])} "
            f"| {span(n['activations_and_shifts_auc'])} | {span(n['gradients_auc'])} "
            f"| {span(n['few_label_auc'])} | {mu} | {epsilon} |"
        )
    lines.append("")
    lines.append(
        f"Mean (range) over {len(summary['seeds'])} seeds; accuracy lost to LoRA: {span(summary['accuracy_lost'], 3)}. "
        "Attacks on activations and shifts are taken at their best moment of the run, on either operator; 0.5 is "
        "guessing. μ, and ε at δ = 1e-5: bounds on what one operator can learn about all 4,800 labels. "
        "`python -m experiments.demo_seeds` makes these numbers."
    )
    return "\n".join(lines)


def benchmark_table() -> str:
    """Ratios from benchmarks/results."""
    same, steps = read("benchmarks/results/equivalence.json"), read("benchmarks/results/steps.json")
    wire, crash = read("benchmarks/results/wire_bytes.json"), read("benchmarks/results/resilience.json")
    rows: list[tuple[str, str]] = []
    for dtype in ("float32", "float64"):
        for case, error in same[f"gradients, servers in {dtype}"].items():
            rows.append((f"gradients against stock PEFT, {case}, servers in {dtype}: relative error", f"{error:.1e}"))
    for case, numbers in same["training"].items():
        if isinstance(numbers, dict) and "final_weights_relative_error" in numbers:
            rows.append(
                (f"weights after 50 steps, {case}: relative error", f"{numbers['final_weights_relative_error']:.1e}")
            )
            rows.append(
                (
                    f"training loss over 50 steps, {case}: largest difference",
                    f"{numbers['largest_loss_difference']:.1e}",
                )
            )
    for case, numbers in {**steps, **read("benchmarks/results/inversion.json")}.items():
        if isinstance(numbers, dict) and "median" in numbers:
            rows.append(
                (f"time: {case}", f"{numbers['median']:.2f} (quartiles {numbers['q25']:.2f}–{numbers['q75']:.2f})")
            )
        elif isinstance(numbers, dict) and "share" in numbers:
            rows.append((f"time: {case}", f"{100 * numbers['share']:.1f}%"))
    for case in ("LoRA step", "padded LoRA step", "P3EFT step"):
        rows.append((f"bytes on the wire / raw tensors, {case}", f"{wire[case]['ratio']:.3f}"))
    killed = "kill -9 of one operator in the middle of a step, restarted: final weights"
    twice, disturbed = (
        crash[f"padded LoRA, {runs}: relative difference of final weights"]
        for runs in ("two undisturbed runs", "disturbed and not")
    )
    rows.append((f"{killed}, LoRA", "bit-identical" if crash["LoRA bit-identical"] else "differ"))
    rows.append((f"{killed}, padded LoRA: relative difference", f"{disturbed:.1e} (two undisturbed runs: {twice:.1e})"))
    machine = steps["machine"]
    table = [*header("measured", "result"), *(f"| {name} | {value} |" for name, value in rows)]
    note = (
        f"{machine['cores']} cores, {machine['machine']}, torch {machine['torch']}. `make bench` makes these numbers."
    )
    return "\n".join([*table, "", note])


def fill(path: Path, marker: str, content: str) -> None:
    """Replaces what stands between `<!-- marker -->` and `<!-- /marker -->` (or inserts after the first)."""
    text = path.read_text()
    block = f"<!-- {marker} -->\n{content}\n<!-- /{marker} -->"
    pattern = rf"<!-- {marker} -->(.*?<!-- /{marker} -->)?"
    path.write_text(re.sub(pattern, lambda _: block, text, count=1, flags=re.S))


def main() -> None:
    fill(PAGE, "demo", demo_table())
    if (ROOT / "benchmarks" / "results").is_dir():
        fill(PAGE, "benchmarks", benchmark_table())


if __name__ == "__main__":
    main()
