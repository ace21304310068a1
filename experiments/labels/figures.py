"""Draws the experiments' figures and fills their tables in docs/labels/results.md, from the JSON of finished runs.

python -m experiments.labels.figures
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from blindtune.labels import METHODS
from experiments.figures import ROOT, fill, header
from experiments.labels.run import RESULTS

matplotlib.use("Agg")
matplotlib.rcParams.update({"svg.hashsalt": "blindtune", "svg.fonttype": "none", "font.size": 9})
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from experiments.labels.published_figures import measures_table, rates_table, sensitivity, sweep_table  # noqa: E402
from experiments.labels.sweep import FOLDER as SWEEP  # noqa: E402

PAGE = ROOT / "docs" / "labels" / "results.md"
PAPERS = ROOT / "docs" / "papers.md"
PICTURES = ROOT / "docs" / "images"
PUBLISHED_ATTACKS = ("spectral", "norm", "k-means")
ZERO_BITS = tuple(name for name, kind in METHODS.items() if not kind.by_steps)
"""Methods that send nothing about labels. Their runs have nothing to attack, and are in accuracy/."""
ORDER = (*ZERO_BITS, "lora", "distance-correlation", "pslf", "randomized-response", "p3eft", "padded-lora")
NAMES = {name: METHODS[name].title for name in (*ORDER, *(set(METHODS) - set(ORDER)))}
COLOURS = dict.fromkeys(NAMES, "#1a202c") | {
    "features": "#718096",
    "side": "#4a5568",
    "lora": "#c53030",
    "distance-correlation": "#2b6cb0",
    "pslf": "#2f855a",
    "randomized-response": "#319795",
    "p3eft": "#b7791f",
    "padded-lora": "#6b46c1",
}
IN_WORDS = {"first=0": "all layers", "first=4": "top two blocks", "m=2": "gradients in shares"}
TASKS = {
    "sst2": "SST-2, MiniLM",
    "mrpc": "MRPC, MiniLM",
    "trec": "TREC (6 classes), MiniLM",
    "sst2-mpnet": "SST-2, MPNet-base (3,000 sentences)",
    "sst2-smollm2": "SST-2, SmolLM2-135M",
}
NEVER_TUNED = {"banking77": "Banking77 (77 classes)", "symptom2disease": "Symptom2Disease (24 classes)"}
"""Tasks on which no setting was chosen."""


@dataclass(frozen=True)
class Arm:
    """All seeds of one method with one setting on one task."""

    name: str
    runs: list[dict[str, Any]]

    @property
    def method(self) -> str:
        return self.runs[0]["method"]

    @property
    def setting(self) -> str:
        settings = self.name.split("+")[1:]
        return ", ".join(IN_WORDS.get(setting, setting).replace("_", " ") for setting in settings)

    @property
    def label(self) -> str:
        return NAMES[self.method] + (f" ({self.setting})" if self.setting else "")

    def values(self, read: Callable[[dict[str, Any]], float | None]) -> list[float]:
        return [value for value in map(read, self.runs) if value is not None]


def load(task: str) -> dict[str, Arm]:
    """Arm -> its runs, by seed."""
    arms = {name: Arm(name, runs) for name, runs in runs_by_arm(RESULTS / task).items()}
    return {name: arm for name, arm in accuracies(task).items() if arm.method in ZERO_BITS} | arms


def accuracies(task: str) -> dict[str, Arm]:
    """Arm -> its runs without attacks, by seed."""
    return {name: Arm(name, runs) for name, runs in runs_by_arm(RESULTS / "accuracy" / task).items()}


def runs_by_arm(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All finished runs of a folder."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(folder.glob("*-seed*.json")):
        run = json.loads(path.read_text())
        found[run["arm"]].append(run)
    return found


def accuracy(run: dict[str, Any]) -> float:
    return run["test"]["accuracy"]


def leak(run: dict[str, Any], *, of: str = "unsupervised", attacks: Sequence[str] | None = None) -> float | None:
    """The best attack without labels over moments, operators and channels of a kind."""
    found = run.get("audit", {}).get(of, {})
    values = [auc for attack, auc in found.items() if attacks is None or attack in attacks]
    return max(values, default=None)


def published_leak(run: dict[str, Any]) -> float | None:
    """With the paper's attacks only."""
    return leak(run, attacks=PUBLISHED_ATTACKS)


def any_leak(run: dict[str, Any]) -> float | None:
    return leak(run)


def gradient_leak(run: dict[str, Any]) -> float | None:
    return leak(run, of="gradients")


def colluding_leak(run: dict[str, Any]) -> float | None:
    return leak(run, of="colluding")


def chance(run: dict[str, Any]) -> float | None:
    """The same attacks on what knows no labels: the frozen model, and adapters in random order if they were run."""
    return run["audit"]["frozen"]["auc"] if "audit" in run else None


def few(run: dict[str, Any]) -> float | None:
    """The best probe with 64 known labels on what the model computes."""
    return run["audit"]["computed"]["64 labels"] if "audit" in run else None


def few_gain(run: dict[str, Any]) -> float | None:
    return few(run) - few_frozen(run) if "audit" in run else None  # type: ignore[operator]


def component(run: dict[str, Any]) -> float | None:
    """The best of ten principal components, for whoever finds out which one it is."""
    return run["audit"]["computed"]["which component"] if "audit" in run else None


def component_frozen(run: dict[str, Any]) -> float | None:
    return run["audit"]["frozen_computed"]["which component"] if "audit" in run else None


def few_frozen(run: dict[str, Any]) -> float | None:
    return run["audit"]["frozen_computed"]["64 labels"] if "audit" in run else None


def span(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and the range where there are several."""
    if not values:
        return "–"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def frozen_accuracy(arms: dict[str, Arm]) -> list[float]:
    return [run["frozen_test"]["accuracy"] for run in arms["lora"].runs] if "lora" in arms else []


def table(arms: dict[str, Arm], order: Sequence[Arm]) -> str:
    """Accuracy and leaks, mean (range) over seeds."""
    leaks = ("paper's attacks", "all attacks without labels", "on gradients", "best of 10 components")
    lines = header("method", "seeds", "test accuracy", *leaks, "64 labels known", "if both operators collude")
    probes, ten = ([value for arm in order for value in arm.values(f)] for f in (few_frozen, component_frozen))
    if frozen_accuracy(arms):
        lines.append(
            f"| last layer, logistic regression | – | {span(frozen_accuracy(arms)[:1])} "
            f"| – | – | – | {span(ten, 2)} | {span(probes, 2)} | – |"
        )
    controls = [value for arm in order if arm.method == "padded-lora" for value in arm.values(chance)]
    if controls:
        lines.append(
            f"| padded adapters in random order | {len(controls)} | – | – | {span(controls, 2)} | – | – | – | – |"
        )
    for arm in order:
        lines.append(
            f"| {arm.label} | {len(arm.runs)} | {span(arm.values(accuracy))} | {span(arm.values(published_leak), 2)} "
            f"| {span(arm.values(any_leak), 2)} | {span(arm.values(gradient_leak), 2)} "
            f"| {span(arm.values(component), 2)} | {span(arm.values(few), 2)} "
            f"| {span(arm.values(colluding_leak), 2)} |"
        )
    return "\n".join(lines)


TOGETHER = ("sst2", "mrpc", "trec", "banking77", "symptom2disease")
COMPARED = {
    **{name: NAMES[name] for name in ZERO_BITS},
    "lora+readout=all": "LoRA, all layers read",
    "lora": "LoRA, last layer read",
    "padded-lora+epochs=2+lr=0.001+warmup=60+readout=all": "padded LoRA, all layers read",
    "padded-lora+epochs=2+lr=0.001+warmup=60": "padded LoRA, last layer read",
}
"""Arms that are compared with one readout."""


def together() -> str:
    """Test accuracy of the methods that send nothing about labels, and of LoRA with the same readout."""
    lines = header("", *(f"{TASKS.get(task, NEVER_TUNED.get(task, task))}" for task in TOGETHER))
    for name, title in COMPARED.items():
        found = [{**load(task), **accuracies(task)}.get(name) for task in TOGETHER]
        if any(found):
            cells = [span(arm.values(accuracy)) if arm else "–" for arm in found]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def costs() -> str:
    """What a text costs, once: bytes that the client receives, and seconds of fitting on one core."""
    lines = header("", *(f"{TASKS.get(task, NEVER_TUNED.get(task, task))}" for task in TOGETHER))
    for name in ZERO_BITS:
        found = [accuracies(task).get(name) for task in TOGETHER]
        if any(found):
            cells = [
                f"{np.mean(arm.values(lambda run: run['received_per_text'])) / 1000:.0f} kB, "
                f"{np.mean(arm.values(lambda run: run['train_seconds'])):.0f} s"
                if arm
                else "–"
                for arm in found
            ]
            lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def choices() -> str:
    """What `features` chose by cross-validation on training texts."""
    lines = header("task", "chosen", "held-out accuracy", "test accuracy")
    for task in TOGETHER:
        arm = accuracies(task).get("features")
        if arm:
            run, chosen = arm.runs[0], arm.runs[0]["chosen"]
            settings = ", ".join(f"{key} {value:g}" for key, value in chosen["settings"].items())
            lines.append(
                f"| {TASKS.get(task, NEVER_TUNED.get(task, task))} | {chosen['kind']} on {chosen['layers']}"
                f"{f' ({settings})' if settings else ''} | {chosen['accuracy']:.3f} | {accuracy(run):.3f} |"
            )
    return "\n".join(lines)


def bars(tasks: dict[str, dict[str, Arm]]) -> Figure:
    """Figures 4 and 6: accuracy, and the strongest attacks, by method and task.

    Dotted: the same attacks on what knows no labels, padded adapters in random order or frozen features.
    """
    rows = (("test accuracy", accuracy), ("best attack without labels", any_leak), ("64 labels known", few))
    figure, axes = plt.subplots(len(rows), len(tasks), figsize=(3.1 * len(tasks), 7.6), squeeze=False)
    for column, (task, arms) in enumerate(tasks.items()):
        order = main_arms(arms)
        for row, (title, read) in enumerate(rows):
            axis = axes[row][column]
            for place, arm in enumerate(order):
                values = arm.values(read)
                if not values:  # labels were never used
                    continue
                mean = float(np.mean(values))
                axis.bar(place, mean, color=COLOURS[arm.method], width=0.75)
                axis.vlines(place, min(values), max(values), color="black", linewidth=1.2)
                axis.text(place, max(values) + 0.005, f"{mean:.2f}", ha="center", fontsize=7)
            axis.set_xticks(
                range(len(order)), [NAMES[arm.method] for arm in order], rotation=40, ha="right", fontsize=7
            )
            lowest = min((min(arm.values(accuracy)) for arm in order), default=0.5)
            axis.set_ylim(*((max(0.0, lowest - 0.1), 1.03) if row == 0 else (0.5, 1.03)))
            floor = [value for arm in order for value in arm.values(few_frozen)] if read is few else []
            if read is any_leak:
                floor = [value for arm in order if arm.method == "padded-lora" for value in arm.values(chance)]
            if floor:
                axis.axhline(float(np.mean(floor)), color=COLOURS["features"], linestyle=":")
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(f"{TASKS[task]}\n{title}" if row == 0 else title, fontsize=9)
    figure.tight_layout()
    return figure


def main_arms(arms: dict[str, Arm]) -> list[Arm]:
    """One setting of each method: the one with the most seeds, of those the shortest name."""
    chosen: list[Arm] = []
    for method in NAMES:
        candidates = [arm for arm in arms.values() if arm.method == method and arm not in on_all_layers(arms)]
        if candidates:
            chosen.append(max(candidates, key=lambda arm: (len(arm.runs), -len(arm.name))))
    return chosen


def on_all_layers(arms: dict[str, Arm]) -> list[Arm]:
    """Arms with adapters on every block, not only the upper ones: beside the main arms, not in their place."""
    return [arm for name, arm in arms.items() if "first=0" in name.split("+")]


def with_shares(arms: dict[str, Arm]) -> list[Arm]:
    """Baselines whose gradients travel in shares too."""
    return [arm for name, arm in arms.items() if "m=2" in name.split("+")]


def swept(arms: dict[str, Arm], method: str, key: str) -> list[Arm]:
    """A method's arms that differ in one option alone, in its order."""
    found = [arm for arm in arms.values() if arm.method == method and (arm.name == method or _only(arm.name) == key)]
    return sorted(found, key=lambda arm: arm.runs[0]["options"].get(key, float("nan")))


def _only(name: str) -> str:
    """The one option that an arm's name sets; empty if it sets several."""
    settings = name.split("+")[1:]
    return settings[0].split("=")[0] if len(settings) == 1 else ""


SWEEPS = {"distance-correlation": "activation_weight", "pslf": "epsilon", "p3eft": "activation_weight"}


def tradeoff(arms: dict[str, Arm]) -> Figure:
    """Figure 5: accuracy against leak while each method's strength sweeps."""
    figure, axes = plt.subplots(1, 3, figsize=(11.4, 3.6), sharey=True)
    panels = (
        ("attacks of the paper", published_leak),
        ("all attacks without labels", any_leak),
        ("64 labels known: gain over frozen features", few_gain),
    )
    for axis, (title, read) in zip(axes, panels, strict=True):
        for method in ("lora", "distance-correlation", "pslf", "p3eft", "padded-lora"):
            points = [
                (float(np.mean(arm.values(read))), float(np.mean(arm.values(accuracy))), len(arm.runs))
                for arm in (swept(arms, method, SWEEPS[method]) if method in SWEEPS else
                            [arm for arm in main_arms(arms) if arm.method == method])
            ]  # fmt: skip
            points.sort()
            if points:
                x, y, _ = zip(*points, strict=True)
                style = "o-" if len(points) > 1 else ("*" if method == "padded-lora" else "s")
                axis.plot(x, y, style, color=COLOURS[method], label=NAMES[method], markersize=11 if style == "*" else 5)
        frozen = frozen_accuracy(arms)
        if frozen:
            axis.axhline(frozen[0], color=COLOURS["features"], linestyle=":", label="frozen")
        axis.set(xlabel="AUC" + (", difference" if read is few_gain else ""), title=title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test accuracy")
    axes[2].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    return figure


MEASURES: dict[str, tuple[Callable[[dict[str, Any]], float | None], Any]] = {
    "the paper's attacks, .55–.75": (published_leak, np.linspace(0.55, 0.75, 41)),
    "all without labels, .55–.75": (any_leak, np.linspace(0.55, 0.75, 41)),
    "64 labels known, 0–.20 above frozen": (few_gain, np.linspace(0.0, 0.2, 41)),
}
"""How leak is measured -> from one run, and at which levels curves are compared."""


def envelope(points: Sequence[tuple[float, float]], levels: Any, fallback: float) -> Any:
    """The best accuracy at each level among settings that leak no more; frozen features' where there is none."""
    reached = [[accuracy for leak, accuracy in points if leak <= level] for level in levels]
    return np.array([max(found, default=fallback) for found in reached])


PADDED = {
    "upper half": ("padded-lora+epochs=2+lr=0.001+warmup=60", "lora"),
    "all layers": ("padded-lora+epochs=2+lr=0.001+warmup=60+first=0", "lora+first=0+lr=0.003"),
}
"""Padded LoRA on SST-2, and the LoRA that it is held against."""


def targets(arms: dict[str, Arm]) -> str:
    """What the padded method was asked to reach on SST-2, and what it reached; means and ranges over seeds."""
    lines = header("", "asked", *PADDED)
    pairs = [(arms[name], arms[lora]) for name, lora in PADDED.values()]

    def row(title: str, asked: str, read: Callable[[dict[str, Any], dict[str, Any]], float], digits: int = 3) -> None:
        cells = [span([read(a, b) for a, b in zip(p.runs, lora.runs, strict=True)], digits) for p, lora in pairs]
        lines.append(f"| {title} | {asked} | {' | '.join(cells)} |")

    row("accuracy lost to LoRA, points", "≤ 1.5", lambda p, lora: 100 * (accuracy(lora) - accuracy(p)), 1)
    row("best attack without labels", "≤ 0.60", lambda p, _: any_leak(p) or 0.5)
    row("upper end of its 95% interval", "≤ 0.65", lambda p, _: p["audit"]["headline"]["high"])
    row("the same attacks on adapters in random order", "–", lambda p, _: chance(p) or 0.5)
    for knows in ("16 labels", "64 labels", "256 labels"):
        row(f"{knows} known: above frozen features, points", "≤ 2", partial(_gained, knows), 1)
    row("best attack on shares", "≤ 0.52", lambda p, _: gradient_leak(p) or 0.5)
    row("μ of everything that one operator sees", "≤ 0.3", lambda p, _: whole_mu(p["report"]), 2)
    return "\n".join(lines)


def whole_mu(report: dict[str, float]) -> float:
    """Of a run's whole view. Runs before the lattice have the bits that their noise was made for: μ² = 8 · nats."""
    return report.get("mu", math.sqrt(8.0 * math.log(2.0) * report["information_bits"]))


def _gained(knows: str, run: dict[str, Any], _: dict[str, Any]) -> float:
    """Points of AUC."""
    return 100 * (run["audit"]["computed"][knows] - run["audit"]["frozen_computed"][knows])


def area(arms: dict[str, Arm], other: str, measure: str) -> dict[str, Any]:
    """Padded LoRA's curve minus another method's: the mean over levels with a 95% interval over resampled seeds."""
    ours = [arm for arm in arms.values() if arm.method == "padded-lora" and arm in main_arms(arms)]
    theirs = swept(arms, other, SWEEPS[other])
    read, levels = MEASURES[measure]
    fallback = float(np.mean(frozen_accuracy(arms)))

    def curve(chosen: Sequence[Arm], random: np.random.Generator | None) -> Any:
        points: list[tuple[float, float]] = []
        for arm in chosen:
            drawn = (
                arm.runs
                if random is None
                else [arm.runs[i] for i in random.integers(len(arm.runs), size=len(arm.runs))]
            )
            leaks = [value for value in map(read, drawn) if value is not None]
            points.append((float(np.mean(leaks)), float(np.mean([accuracy(run) for run in drawn]))))
        return envelope(points, levels, fallback)

    gap = curve(ours, None) - curve(theirs, None)
    random = np.random.default_rng(0)
    drawn = [float((curve(ours, random) - curve(theirs, random)).mean()) for _ in range(2000)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"mean": float(gap.mean()), "low": float(low), "high": float(high), "worst": float(gap.min()),
            "wins": float((gap > 0).mean()), "loses": float((gap < 0).mean())}  # fmt: skip


def areas(arms: dict[str, Arm]) -> str:
    gained = "accuracy gained, mean over the levels"
    lines = header("against", "leak", gained, "better at", "worse at", "worst level")
    for other in ("distance-correlation", "pslf", "p3eft"):
        if not swept(arms, other, SWEEPS[other]):
            continue
        for name in MEASURES:
            a = area(arms, other, name)
            lines.append(
                f"| {NAMES[other]} | {name} | {a['mean']:+.3f} [{a['low']:+.3f}, {a['high']:+.3f}] "
                f"| {a['wins']:.0%} of levels | {a['loses']:.0%} | {a['worst']:+.3f} |"
            )
    return "\n".join(lines)


def published_blocks(tasks: dict[str, dict[str, Arm]]) -> None:
    """Fills the blocks of the page on papers: the paper's measure beside ours, and the sweep."""
    for task, arms in tasks.items():
        measured = {name: arm.runs for name, arm in arms.items() if all("paper" in run for run in arm.runs)}
        if measured:
            labels = {name: arms[name].label for name in measured}
            fill(PAPERS, f"measures-{task}", measures_table(task, measured, labels.__getitem__, any_leak))
    found = {**runs_by_arm(RESULTS / "selection" / "sst2"), **runs_by_arm(RESULTS / "sst2")}
    recipes = {name: runs for name, runs in found.items() if name.startswith("p3eft+recipe=2023")}
    if recipes:
        fill(PAPERS, "recipe-rates", rates_table(recipes))
    swept_tasks = {task: dict(runs_by_arm(SWEEP / task)) for task in ("sst2", "mrpc")}
    swept_tasks = {task: arms for task, arms in swept_tasks.items() if arms}
    for task, arms in swept_tasks.items():
        fill(PAPERS, f"sweep-{task}", sweep_table(task, arms))
    if swept_tasks:
        save(sensitivity(swept_tasks), "sensitivity")
        fill(PAPERS, "sensitivity", "![Accuracy against leak for each setting of P3EFT](images/sensitivity.svg)")


def planes(pictures: dict[str, Any], rows: Sequence[tuple[str, str]]) -> Figure:
    """Figures 1 and 3: two principal components at several steps, coloured by the true label."""
    steps = sorted(pictures, key=int)
    figure, axes = plt.subplots(len(rows), len(steps), figsize=(2.3 * len(steps), 2.35 * len(rows)), squeeze=False)
    for row, (name, title) in enumerate(rows):
        for column, step in enumerate(steps):
            axis, entry = axes[row][column], pictures[step][name]
            points = np.array(entry["points"])
            axis.scatter(points[:, 0], points[:, 1], c=np.array(entry["labels"]), cmap="coolwarm", s=4, alpha=0.7)
            low, high = np.percentile(points, [1, 99], axis=0)
            margin = 0.15 * (high - low)
            axis.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(f"step {step}: best attack {entry['auc']:.2f}", fontsize=8)
            if column == 0:
                axis.set_ylabel(title, fontsize=8)
    figure.tight_layout()
    return figure


def gradients_table(result: dict[str, Any]) -> str:
    """XGBoost on what travelled, mean (range) over seeds."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in result["xgboost"]:
        groups[entry["of"]].append(entry)
    lines = header("fitted on", "accuracy on its training texts", "accuracy, balanced test texts", "AUC")
    for name, entries in groups.items():
        cells = [span([e[key] for e in entries]) for key in ("train_accuracy", "test_accuracy", "test_auc")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    apart = [run["mean_difference"] for run in result["losses"].values()]
    largest = [run["largest_difference"] for run in result["losses"].values()]
    lines += [
        "",
        f"Training losses with shares and without differ by {np.mean(apart):.4f} on average over the steps, "
        f"{max(largest):.3f} at most.",
    ]
    return "\n".join(lines)


def inversion_table(result: dict[str, dict[str, Any]]) -> str:
    """What one operator reads from optimizer steps, by moment; mean (range) over seeds."""
    runs = {arm: list(by_seed.values()) for arm, by_seed in result.items()}
    moments = list(dict.fromkeys(moment for found in runs.values() for run in found for moment in run["auc"]))
    lines = header("", "seeds", "test accuracy", *moments)
    for arm, found in runs.items():
        cells = [span([run["test"]["accuracy"] for run in found])]
        for moment in moments:
            seen = [run["auc"][moment] for run in found if moment in run["auc"]]
            cells.append(span(seen, 2) if seen else "no step to invert")
        lines.append(f"| {INVERTED[arm]} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


INVERTED = {
    "shares": "gradients in shares, nothing else",
    "moments": "random moments, 0.1",
    "turns": "four operators that take turns",
    "noise": "noise of 0.01 on adapters",
    "distance-correlation": "distance correlation, gradients in shares",
}


def save(figure: Figure, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})
    figure.savefig(PICTURES / f"{name}.png", dpi=130, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    tasks = {task: arms for task in TASKS if (arms := load(task))}
    save(bars(tasks), "accuracy-and-leak")
    fill(PAGE, "together", together())
    fill(PAGE, "costs", costs())
    fill(PAGE, "choices", choices())
    for task, arms in tasks.items():
        fill(PAGE, task, table(arms, main_arms(arms) + with_shares(arms) + on_all_layers(arms)))
    published_blocks(tasks)
    sst2 = tasks["sst2"]
    save(tradeoff(sst2), "tradeoff")
    fill(PAGE, "areas", areas(sst2))
    fill(PAGE, "targets", targets(sst2))
    for method, key in SWEEPS.items():
        fill(PAGE, f"sweep-{method}", table({}, swept(sst2, method, key)))
    ablated = [arm for name, arm in sorted(sst2.items()) if arm.method == "p3eft" and "+" in name]
    ablated = [arm for arm in ablated if arm not in swept(sst2, "p3eft", "activation_weight")]
    fill(PAGE, "ablation", table({}, ablated))
    path = RESULTS / "gradients.json"
    if path.exists():
        result = json.loads(path.read_text())
        fill(PAGE, "xgboost", gradients_table(result))
        save(
            planes(
                result["pictures"],
                [("gradients", "gradients"), ("shares", "one share"), ("activations", "activations")],
            ),
            "gradients-and-activations",
        )
        kinds = [(f"parameter gradients, {kind}", kind) for kind in ("normal", "private")]
        save(planes(result["pictures"], kinds), "parameter-gradients")
    path = RESULTS / "inversion.json"
    if path.exists():
        fill(PAGE, "inversion", inversion_table(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
