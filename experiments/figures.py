"""Fills the README's and the results page's tables from committed JSON, so that no number is typed by hand.

python -m experiments.figures
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


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
        f"| frozen model | {span(summary['frozen_accuracy'], 3)} | – | {span(summary['frozen_attack_auc'])} | – "
        f"| {span(summary['frozen_few_label_auc'])} | – | – |",
    ]
    for method, name in (("lora", "plain LoRA"), ("p3eft", "P3EFT")):
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


def humps_sentence() -> str:
    """About the attack that finds a direction in anything."""
    summary = read("experiments/results/demo/summary.json")
    ours, published = summary["p3eft"]["activations_and_shifts_auc"], summary["p3eft"]["published_attacks_auc"]
    return (
        f"The most two-humped of ten components is the one attack on P3EFT above {published['max']:.2f}: "
        f"{span(ours)}. It picks a direction of *some* function of the texts at each look; on adapters in random "
        f"order, which know nothing, it reached {span(summary['frozen_attack_auc'])} in the same runs. The bound above "
        f"says that what is left is luck and text."
    )


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
    for case in ("LoRA step", "P3EFT step", "published P3EFT step"):
        rows.append((f"bytes on the wire / raw tensors, {case}", f"{wire[case]['ratio']:.3f}"))
    killed = "kill -9 of one operator in the middle of a step, restarted: final weights"
    twice, disturbed = (
        crash[f"P3EFT, {runs}: relative difference of final weights"]
        for runs in ("two undisturbed runs", "disturbed and not")
    )
    rows.append((f"{killed}, LoRA", "bit-identical" if crash["LoRA bit-identical"] else "differ"))
    rows.append((f"{killed}, P3EFT: relative difference", f"{disturbed:.1e} (two undisturbed runs: {twice:.1e})"))
    machine = steps["machine"]
    table = [*header("measured", "result"), *(f"| {name} | {value} |" for name, value in rows)]
    note = (
        f"{machine['cores']} cores, {machine['machine']}, torch {machine['torch']}. `make bench` makes these numbers."
    )
    return "\n".join([*table, "", note])


def cost_sentence() -> str:
    """What the README says of costs and of equality."""
    same, steps = read("benchmarks/results/equivalence.json"), read("benchmarks/results/steps.json")
    wire, crash = read("benchmarks/results/wire_bytes.json"), read("benchmarks/results/resilience.json")
    gradients = same["gradients, servers in float32"]
    lora = steps["remote LoRA step / stock PEFT step"]["median"]
    p3eft = steps["P3EFT step at one operator / 2 LoRA steps, upper half"]["median"]
    retained = steps["backward, retained / recomputed"]["median"]
    unchanged = "changes no bit" if crash["LoRA bit-identical"] else "changes the last bits"
    counted = "no step twice" if crash["P3EFT, shares counted"] == crash["steps"] else "steps twice"
    return (
        f"Measured ratios (`make bench`): a remote LoRA step takes {lora:.2f} times as long as one with stock PEFT in "
        f"one process; an operator's part in a P3EFT step {p3eft:.2f} times two LoRA steps; backward from a retained "
        f"graph {retained:.2f} times recomputation; bytes on the wire {wire['P3EFT step']['ratio']:.3f} times the raw "
        f"tensors. Gradients equal stock PEFT's to {gradients['without shares']:.0e}, in shares at "
        f"σ/C = 1,000 (about the default noise of 200 steps) to "
        f"{gradients['shares at sigma/C = 1000']:.0e}; weights after 50 steps to "
        f"{same['training']['plain']['final_weights_relative_error']:.0e}. An operator that is killed "
        f"in the middle of a "
        f"step and started again {unchanged} of LoRA's result, and P3EFT sends {counted}. "
        "All of it in [docs/results.md](docs/results.md)."
    )


def fill(path: Path, marker: str, content: str) -> None:
    """Replaces what stands between `<!-- marker -->` and `<!-- /marker -->` (or inserts after the first)."""
    text = path.read_text()
    block = f"<!-- {marker} -->\n{content}\n<!-- /{marker} -->"
    pattern = rf"<!-- {marker} -->(.*?<!-- /{marker} -->)?"
    path.write_text(re.sub(pattern, lambda _: block, text, count=1, flags=re.S))


def main() -> None:
    fill(ROOT / "README.md", "results", demo_table())
    fill(ROOT / "README.md", "humps", humps_sentence())
    fill(ROOT / "docs" / "results.md", "demo", demo_table())
    if (ROOT / "benchmarks" / "results").is_dir():
        fill(ROOT / "docs" / "results.md", "benchmarks", benchmark_table())
        fill(ROOT / "README.md", "costs", cost_sentence())


if __name__ == "__main__":
    main()
