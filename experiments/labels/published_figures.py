"""Tables and figures that hold the paper's measure beside ours, from the JSON of runs that have both.

The paper's: each adapter's own activations, the worst adapter, at the last step (`experiments.labels.published`). Ours:
all channels of the audit, at several moments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from blindtune.audit.labels.published import PUBLISHED
from experiments.figures import header

Run = Mapping[str, Any]
Read = Callable[[Run], float | None]
PARTS = ("training", "validation")
CHANNELS = ("shifts", "differences")


def measure(part: str, channel: str, name: str) -> Read:
    """Reads one of the paper's measures of a channel; None where a run lacks it."""

    def read(run: Run) -> float | None:
        return run.get("paper", {}).get(part, {}).get(channel, {}).get(name)

    return read


def published_auc(run: Run) -> float | None:
    """The paper's measure as an AUC: the worse of spectral and norm on validation texts' activations."""
    return _worst(run, "activations")


def hidden_auc(run: Run) -> float | None:
    """The same attacks on what the paper leaves out: the worse of shifts and differences."""
    return max((v for v in (_worst(run, channel) for channel in CHANNELS) if v is not None), default=None)


def probed(run: Run) -> float | None:
    """Logistic regression on the worst of activations, shifts and differences of validation texts."""
    values = [measure("validation", channel, "logistic regression")(run) for channel in ("activations", *CHANNELS)]
    return max((value for value in values if value is not None), default=None)


def _worst(run: Run, channel: str) -> float | None:
    values = [measure("validation", channel, name)(run) for name in ("spectral", "norm")]
    return max((value for value in values if value is not None), default=None)


def utility(task: str) -> tuple[str, Read]:
    """The paper's metric: F1 on MRPC, accuracy elsewhere."""
    if task == "mrpc":
        return "test F1", lambda run: run["test"].get("binary_f1")
    return "test accuracy", lambda run: run["test"]["accuracy"]


def mean_of(runs: Sequence[Run], read: Read) -> float | None:
    values = [value for value in map(read, runs) if value is not None]
    return float(np.mean(values)) if values else None


def measures_table(task: str, arms: Mapping[str, Sequence[Run]], label: Callable[[str], str], ours: Read) -> str:
    """The paper's four measures on training | validation texts, then shifts, differences, and the audit's best attack.

    Args:
        arms: runs with `"paper"`, by arm.
        label: the name of an arm in the table.
        ours: the best attack without labels of a run's audit.
    """
    title, metric = utility(task)
    outside = [f"{channel}: {name}" for channel in CHANNELS for name in ("spectral", "logistic regression")]
    lines = header("method", "seeds", title, *PUBLISHED, *outside, "all channels, best attack without labels")
    frozen = [run for runs in arms.values() for run in runs]
    cells = [_pair(frozen[:1], "frozen", name) for name in PUBLISHED]
    lines.append(f"| frozen model | – | {_number(mean_of(frozen, _frozen_accuracy(task)))} | {' | '.join(cells)} |"
                 + " – |" * (len(outside) + 1))  # fmt: skip
    for arm, runs in arms.items():
        cells = [_pair(runs, "activations", name) for name in PUBLISHED]
        cells += [_pair(runs, channel, name) for channel in CHANNELS for name in ("spectral", "logistic regression")]
        lines.append(
            f"| {label(arm)} | {len(runs)} | {_number(mean_of(runs, metric))} | {' | '.join(cells)} "
            f"| {_number(mean_of(runs, ours))} |"
        )
    return "\n".join(lines)


def _frozen_accuracy(task: str) -> Read:
    return lambda run: None if task == "mrpc" else run.get("frozen_test", {}).get("accuracy")


def _pair(runs: Sequence[Run], channel: str, name: str) -> str:
    """Training | validation, means over seeds."""
    return " / ".join(_number(mean_of(runs, measure(part, channel, name))) for part in PARTS)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


BELOW = 0.06
"""How far below the median the axis of the task's metric begins. Runs below are named at its end."""
PANELS: tuple[tuple[str, Read], ...] = (
    ("the paper's measure:\nactivations of one adapter, AUC", published_auc),
    ("the same attacks\non shifts and differences, AUC", hidden_auc),
    ("logistic regression\non the worst channel, accuracy", probed),
)


def sensitivity(tasks: Mapping[str, Mapping[str, Sequence[Run]]]) -> Figure:
    """Figure 5 of the paper: the task's metric against leak, while the weight of each regularizer changes.

    Args:
        tasks: runs of `experiments.labels.sweep`, by task and arm.
    """
    size = (11.4, 3.5 * len(tasks))
    figure, axes = plt.subplots(len(tasks), len(PANELS), figsize=size, sharey="row", squeeze=False)
    for row, (task, arms) in zip(axes, tasks.items(), strict=True):
        title, metric = utility(task)
        found = curves(arms)
        families = list(dict.fromkeys(map(_family, found)))
        reached = [mean_of(runs, metric) or 0.0 for members in found.values() for runs in members]
        floor = float(np.median(reached)) - BELOW
        for axis, (name, read) in zip(row, PANELS, strict=True):
            for curve, members in found.items():
                points = [(mean_of(runs, read), mean_of(runs, metric)) for runs in members]
                points = [(x, y) for x, y in points if x is not None and y is not None]
                style = "s" if len(points) == 1 else ("--" if curve != _family(curve) else "-") + "o"
                colour = "black" if len(points) == 1 else f"C{families.index(_family(curve))}"
                axis.plot(*zip(*points, strict=True), style, label=curve, color=colour, markersize=4)
                for x, y in points:
                    if y < floor:
                        axis.annotate(f"{y:.2f} ↓", (x, floor), fontsize=7, color=colour, ha="center", va="bottom")
            axis.set_ylim(floor, max(reached) + 0.01)
            axis.set(title=f"{task}\n{name}" if axis is row[0] else name, xlabel="validation texts")
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(title)
    axes[0][-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    return figure


def _family(curve: str) -> str:
    """The curve whose colour it has: the authors' form of a method has that of ours, with a broken line."""
    return curve.replace(", flip", ", confusion").removesuffix(", plain")


def curves(arms: Mapping[str, Sequence[Run]]) -> dict[str, list[Sequence[Run]]]:
    """Curve -> its arms' runs, by increasing weight. A curve without an adversary begins those of its scale."""
    found: dict[str, list[tuple[float, Sequence[Run]]]] = {}
    for runs in arms.values():
        method, options = runs[0]["method"], runs[0]["options"]
        weight = options.get("activation_weight", 0.0)
        if method == "p3eft":
            scale = f"P3EFT, scale {options['mixing_scale']:g}"
            forms = ("flip", "confusion") if weight == 0 else (options["regularizer"],)
            names = [f"{scale}, {form}" for form in forms]
        elif method == "distance-correlation":
            names = ["distance correlation" + (", plain" if options.get("estimator") == "biased" else "")]
        else:
            names = [method]
        for name in names:
            found.setdefault(name, []).append((weight, runs))
    return {name: [runs for _, runs in sorted(points, key=lambda p: p[0])] for name, points in sorted(found.items())}


def sweep_table(task: str, arms: Mapping[str, Sequence[Run]]) -> str:
    """All points of the sweep."""
    title, metric = utility(task)
    lines = header("curve", "weight", "rate", "seeds", title, *(name.replace("\n", " ") for name, _ in PANELS))
    for curve, members in curves(arms).items():
        for runs in members:
            first = runs[0]
            cells = [_number(mean_of(runs, read)) for read in (metric, *(read for _, read in PANELS))]
            weight = first["options"].get("activation_weight")
            lines.append(
                f"| {curve} | {'–' if weight is None else f'{weight:g}'} | {first['learning_rate']:g} | {len(runs)} "
                f"| {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def rates_table(arms: Mapping[str, Sequence[Run]]) -> str:
    """Each run by itself on validation texts, since the secret mixing weights differ from run to run.

    Args:
        arms: runs for selection with `"paper"`, and runs with an audit, by arm.
    """
    lines = header("rate", "seed", "run for", "validation accuracy", *(name.replace("\n", " ") for name, _ in PANELS))
    runs = [run for members in arms.values() for run in members]
    for run in sorted(runs, key=lambda run: (run["learning_rate"], run["seed"], "test" in run)):
        cells = [_number(read(run)) for read in (lambda r: r["validation"]["accuracy"], *(read for _, read in PANELS))]
        kind = "test" if "test" in run else "selection"
        lines.append(f"| {run['learning_rate']:g} | {run['seed']} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)
