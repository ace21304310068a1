"""Fills docs/texts/results.md and docs/choosing.md, and draws their pictures, from the JSON of finished runs.

python -m experiments.texts.figures
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from blindtune.audit.texts.evaluate import STAGES
from experiments.figures import ROOT, fill, header
from experiments.labels.figures import PICTURES, load, plt, runs_by_arm
from experiments.texts.attacks import DEFENCES
from experiments.texts.handed_over import TESTED
from experiments.texts.run import RESULTS, TASKS, WHOLE_TEST

PAGE, CHOOSING = ROOT / "docs" / "texts" / "results.md", ROOT / "docs" / "choosing.md"
UNDEFENDED = "online+up=fp32+down=fp32+battery=all"
DEFENDED = "online+decorrelation_weight=8.0+battery=all"
UNATTACKED = UNDEFENDED.removesuffix("+battery=all")
NAMES = {
    "zero-shot": "zero-shot",
    "full": "full fine-tuning",
    "lora": "LoRA on all blocks",
    UNDEFENDED: "split learning, undefended (fp32)",
    UNATTACKED: "split learning, undefended (fp32)",
    "online": "Online, int8",
    "gradfree": "Gradfree, int8",
    "gradfree+up=int4+down=int4": "Gradfree, int4",
    "gradfree+zo=true": "Gradfree zo, int8",
    "offline": "Offline",
    "offsite": "Offsite-Tuning",
}
SETTINGS = {
    "decorrelation_weight": "decorrelation {}", "noise": "noise {}", "anonymity": "groups of {} tokens",
    "start": "decorrelated bottom, {} steps", "start_weight": "weight {}", "clip_norm": "clipped to {}",
    "epochs": "{} epochs", "lr": "lr {}", "bottom": "bottom of {} blocks", "top": "top of {} blocks",
    "keep": "emulator of {} blocks", "battery": "{} attacks",
    "tune_emulator": "adapters in the emulator too", "up": "{} up", "down": "{} down",
}  # fmt: skip
RESAMPLES = 2000


@dataclass(frozen=True)
class Arm:
    """All seeds of one setting."""

    name: str
    runs: list[dict[str, Any]]

    @property
    def label(self) -> str:
        if self.name in NAMES:
            return NAMES[self.name]
        base = self.name.split("+")[0]
        said = []
        for setting in self.name.split("+")[1:]:
            key, value = setting.split("=")
            if key in SETTINGS and not (base == "full" and key == "lr"):
                said.append(SETTINGS[key].format(value.removesuffix(".0")))
        return NAMES.get(base, base) + (f", {', '.join(said)}" if said else "")

    def hits(self, task: str, key: str = "utility", metric: str = "accuracy") -> np.ndarray:
        """`(seeds, questions)`, 0 or 1; runs without that key are left out."""
        return np.array([[int(c) for c in run[key][task][metric]] for run in self.runs if key in run])

    def attacks(self, attacker: str) -> list[dict[str, Any]]:
        return [a for run in self.runs for a in run.get("attacks", {}).get(attacker, []) if not a["floor"]]

    @property
    def silent(self) -> bool:
        """Whether nothing about texts is sent while it trains."""
        return any("emulator_utility" in run for run in self.runs)

    @property
    def best_attack(self) -> dict[str, Any] | None:
        """Of both attackers, all stages and seeds."""
        return max(self.attacks("static") + self.attacks("adaptive"), key=lambda a: a["accuracy"][0], default=None)

    @property
    def tried(self) -> int:
        """How many attacks there were, of either attacker."""
        return len({a["attack"] for a in self.attacks("static") + self.attacks("adaptive")})

    @property
    def without_adaptive(self) -> str:
        """Why there is no adaptive attacker: nothing to be known, or not run."""
        return "not run" if any(name in self.name for name in (*DEFENCES, "start")) else "as static"

    @property
    def best_at_end(self) -> float:
        """Of both attackers, when training is over and the bottom has learned what it has."""
        found = self.attacks("static") + self.attacks("adaptive")
        return max(a["accuracy"][0] for a in found if a["stage"] == "end")

    @property
    def floor(self) -> float | None:
        floors = [a["accuracy"][0] for r in self.runs for a in r.get("attacks", {}).get("static", []) if a["floor"]]
        return max(floors, default=None)

    def of(self, seeds: Collection[int]) -> Arm:
        """Its runs of these seeds."""
        return Arm(self.name, [run for run in self.runs if run["seed"] in seeds])

    def trained(self, read: Callable[[dict[str, Any]], float | None], *, cpu: bool = False) -> float | None:
        """The mean over seeds of a number that `blindtune texts train` reported; of those that did.

        Args:
            cpu: leaves out runs on a GPU.
        """
        values = [read(run["train"]) for run in self.runs if "train" in run and not (cpu and "device" in run)]
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None


def arms() -> dict[str, Arm]:
    """By name, of all finished runs."""
    return {name: Arm(name, runs) for name, runs in runs_by_arm(RESULTS).items()}


def average(arm: Arm, key: str = "utility", metric: str = "accuracy") -> float:
    """Accuracy over tasks and seeds."""
    return float(np.mean([arm.hits(task, key, metric).mean() for task in TASKS]))


def difference(a: Arm, b: Arm, key: str = "utility", other: str = "utility") -> tuple[float, float, float]:
    """Accuracy of a minus that of b over tasks, with a 95% interval over questions, whose seeds stay together.

    Each run is compared with b's of the same seed, or with the mean of b's where there is none or nothing is drawn.
    """
    drawn = a.name != "zero-shot"
    partners = [[i for i, run in enumerate(b.runs) if drawn and run["seed"] == mine["seed"]] for mine in a.runs]
    rng = np.random.default_rng(0)
    means, samples = [], np.zeros(RESAMPLES)
    for task in TASKS:
        theirs = b.hits(task, other)
        against = np.stack([theirs[some or slice(None)].mean(0) for some in partners])
        apart = (a.hits(task, key) - against).mean(0)
        means.append(apart.mean())
        samples += apart[rng.integers(0, len(apart), (RESAMPLES, len(apart)))].mean(1) / len(TASKS)
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(np.mean(means)), float(low), float(high)


def points(triple: tuple[float, float, float]) -> str:
    mean, low, high = (100 * value for value in triple)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def utility_table(found: dict[str, Arm]) -> str:
    means = ("mean", "mean by character", "against zero-shot, points", "against undefended")
    lines = header("", "seeds", "SciQ", "OpenBookQA", "ARC-Easy", "ARC-Challenge", *means)
    zero, undefended = found["zero-shot"], found.get(UNDEFENDED)

    def row(name: str, arm: Arm, key: str) -> str:
        seeds = len(arm.hits(TASKS[0], key))
        cells = [f"{arm.hits(task, key).mean():.3f}" for task in TASKS]
        against = points(difference(arm, zero, key)) if arm is not zero or key != "utility" else "–"
        to = points(difference(arm, undefended, key)) if undefended and (arm is not undefended) else "–"
        means = f"**{average(arm, key):.3f}** | {average(arm, key, 'accuracy_norm'):.3f}"
        return f"| {name} | {seeds} | {' | '.join(cells)} | {means} | {against} | {to} |"

    for name in ordered(found):
        arm = found[name]
        lines.append(row(arm.label, arm, "utility"))
        if arm.silent:
            lines[-1] = row(f"{arm.label}: deployed", arm, "utility")
            lines.append(row(f"{arm.label}: tuned ends around the emulator", arm, "emulator_utility"))
    offline = found.get("offline") or found.get("offsite")
    if offline:
        lines.append(row("emulator, untuned ends", offline, "emulator_untuned"))
    return "\n".join(lines)


def whole_test_table() -> str:
    """Runs that were evaluated on all test questions; compared where seeds are the same."""
    found = {name: Arm(name, runs) for name, runs in runs_by_arm(RESULTS / WHOLE_TEST).items()}
    lines = header("", "seeds", "SciQ", "OpenBookQA", "ARC-Easy", "ARC-Challenge", "mean", "against undefended, points")
    undefended = found[UNATTACKED]
    for name in sorted(found, key=lambda name: average(found[name])):
        arm = found[name]
        common = {run["seed"] for run in arm.runs} & {run["seed"] for run in undefended.runs}
        against = points(difference(arm.of(common), undefended)) if common and arm is not undefended else "–"
        if name == "zero-shot":
            against = points(difference(arm, undefended))
        cells = [f"{arm.hits(task).mean():.3f}" for task in TASKS]
        seeds = "–" if name == "zero-shot" else ", ".join(str(run["seed"]) for run in arm.runs)
        lines.append(f"| {arm.label} | {seeds} | {' | '.join(cells)} | **{average(arm):.3f}** | {against} |")
    return "\n".join(lines)


def ordered(found: dict[str, Arm]) -> list[str]:
    first = [
        name
        for name in ("zero-shot", *(n for n in found if n.startswith(("full", "lora"))), UNDEFENDED)
        if name in found
    ]
    return first + sorted(name for name in found if name not in first)


def privacy_table(found: dict[str, Arm]) -> str:
    attackers = ("static attacker reads", "adaptive attacker reads")
    lines = header("", "attacks", *attackers, "best of all", "its ROUGE-L", "best at the end", "floor")
    for name in ordered(found):
        arm = found[name]
        best = arm.best_attack
        if best is None:
            if arm.silent:
                lines.append(f"| {arm.label} | – | nothing is sent | nothing is sent | – | – | – | – |")
            continue
        cells = []
        for attacker in ("static", "adaptive"):
            some = arm.attacks(attacker)
            top = max(some, key=lambda a: a["accuracy"][0], default=None)
            mean, low, high = top["accuracy"] if top else (0, 0, 0)
            cells.append(f"{mean:.2f} [{low:.2f}, {high:.2f}] ({top['attack']})" if top else arm.without_adaptive)
        best_read = f"**{best['accuracy'][0]:.2f}** at the {best['stage']}"
        lines.append(
            f"| {arm.label} | {arm.tried} | {cells[0]} | {cells[1]} | {best_read} "
            f"| {best['rougeL'][0]:.2f} | {arm.best_at_end:.2f} | {arm.floor:.2f} |"
        )
    return "\n".join(lines)


def cost_table(found: dict[str, Arm]) -> str:
    wire = ("MB up", "MB down", "bytes for a text and epoch", "MB fetched once")
    lines = header("", "weights here", *wire, "TFLOP here", "peak memory here, MB", "seconds")
    for name in ordered(found):
        arm = found[name]
        up = arm.trained(lambda t: sum(n for kind, n in t["traffic"].items() if kind.endswith("up")))
        if up is None:
            continue
        down = arm.trained(lambda t: sum(n for kind, n in t["traffic"].items() if kind.endswith("down"))) or 0.0
        run = arm.runs[0]
        texts = run["train_examples"] * run["epochs"]
        flops, memory, seconds = (
            arm.trained(lambda t, key=key: t.get(key), cpu=True)
            for key in ("client_flops", "peak_memory_bytes", "seconds")
        )
        once = (arm.trained(lambda t: t["bytes_received"]) or 0.0) - down
        numbers = [
            f"{run['weights_shared']:.0%}",
            f"{up / 1e6:.1f}",
            f"{down / 1e6:.1f}",
            f"{(up + down) / texts:,.0f}",
            f"{once / 1e6:.1f}",
            f"{flops / 1e12:.1f}" if flops else "–",
            f"{memory / 1e6:,.0f}" if memory else "–",
            f"{seconds:.0f}" if seconds else "–",
        ]
        lines.append(f"| {arm.label} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def bytes_of(arm: Arm) -> float:
    """Of hidden states and gradients, for one epoch."""
    moved = arm.trained(lambda t: sum(t["traffic"].values())) or 0.0
    return moved / arm.runs[0]["epochs"]


def handed_over() -> list[dict[str, Any]]:
    """What `experiments.texts.handed_over` wrote, also when deployed parts were called plug-ins."""
    return [
        json.loads(path.read_text().replace('"plug_in"', '"deployed"'))
        for path in sorted((RESULTS / "handed-over").glob("*.json"))
    ]


def deployed_sentence() -> str:
    """The same runs, used as users would."""
    runs = handed_over()
    before = runs[0]["deployed"]["zero_shot"]["accuracy"]
    after = [f"{Arm(r['arm'], []).label} (seed {r['seed']}) {r['deployed']['deployed']['accuracy']:.2f}" for r in runs]
    return (
        f"The same runs through `blindtune texts deploy`, on {TESTED} SciQ test questions that the provider then sees: "
        f"accuracy {before:.2f} as the model is; with tuned weights: {', '.join(after)}. The same code as for users."
    )


def membership_table() -> str:
    """What the tuned ends of Offline runs tell."""
    runs = handed_over()
    lines = header(
        "", "seed", "around", "AUC by loss", "AUC by calibrated loss", "members found at 1% false alarms",
        "memorized answers, members / others",
    )  # fmt: skip
    for run in runs:
        for around, told in run["membership"].items():
            cells = [f"{f['auc']:.2f} [{f['low']:.2f}, {f['high']:.2f}]" for f in told["findings"]]
            cells += [f"{max(f['found'] for f in told['findings']):.1%}"]
            cells += [" / ".join(f"{part:.1%}" for part in told["memorized"])]
            lines.append(f"| {Arm(run['arm'], []).label} | {run['seed']} | {around} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bytes_sentence(found: dict[str, Arm]) -> str:
    """The claims about communication."""
    fp32, int8, once = (bytes_of(found[n]) for n in (UNDEFENDED, "online", "gradfree"))
    once *= found["gradfree"].runs[0]["epochs"]  # however many
    return (
        f"int8 on all four messages against fp32: {1 - int8 / fp32:.1%} fewer bytes in a step. Gradfree against "
        f"Online, both int8, over five epochs (Online's is five times one epoch's): {1 - once / (5 * int8):.1%} fewer."
    )


def undefended_attacks(found: dict[str, Arm]) -> str:
    """Every attack, on split learning without a defence."""
    best: dict[str, dict[str, Any]] = {}
    for a in (a for run in found[UNDEFENDED].runs for a in run.get("attacks", {}).get("static", [])):
        if a["attack"] not in best or a["accuracy"][0] > best[a["attack"]]["accuracy"][0]:
            best[a["attack"]] = a
    metrics = ("accuracy", "rouge1", "rouge2", "rougeL", "set_f1", "meteor")
    lines = header("attack", "tokens in place", "ROUGE-1", "ROUGE-2", "ROUGE-L", "token-set F1", "METEOR")
    for a in sorted(best.values(), key=lambda a: -a["accuracy"][0]):
        name = a["attack"] + (" (observes nothing)" if a["floor"] else "")
        lines.append(f"| {name} | " + " | ".join(f"{a[m][0]:.2f}" for m in metrics) + " |")
    return "\n".join(lines)


def defended_attacks(found: dict[str, Arm]) -> str:
    """Every attack of both attackers, on decorrelation: what it reads at the start, in the middle and at the end."""
    lines = header("attack", *(f"{attacker}, {stage}" for attacker in ("static", "adaptive") for stage in STAGES))
    read: dict[str, dict[tuple[str, str], float]] = {}
    for attacker in ("static", "adaptive"):
        for a in found[DEFENDED].attacks(attacker):
            read.setdefault(a["attack"], {})[attacker, a["stage"]] = a["accuracy"][0]
    for name, cells in sorted(read.items(), key=lambda row: -max(row[1].values())):
        lines.append(f"| {name} | " + " | ".join(f"{cells[key]:.2f}" for key in cells) + " |")
    return "\n".join(lines)


def tradeoff(found: dict[str, Arm]) -> Figure:
    """Utility lost against what the best attack reads."""
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    zero = found["zero-shot"]
    below = {True: -np.inf, False: -np.inf}  # of labels at the left, and at the right
    for arm in sorted((found[name] for name in ordered(found)), key=average):
        best = arm.best_attack
        if best is None and not arm.silent:
            continue
        read, height = best["accuracy"][0] if best else 0.0, average(arm)
        axes.plot(read, height, "o", markersize=6, color="#2b6cb0" if best else "#2f855a")
        left = read < 0.5
        below[left] = max(height, below[left] + 0.007)  # so that no label covers another
        axes.annotate(arm.label, (read, below[left]), xytext=(6, -2), textcoords="offset points", fontsize=7)
    axes.axhline(average(zero), color="#718096", linestyle=":", linewidth=1)
    axes.annotate("zero-shot", (0.0, average(zero)), xytext=(0, 3), textcoords="offset points", fontsize=7)
    axes.axvline(0.5, color="#c53030", linestyle=":", linewidth=1)
    axes.set(xlabel="tokens that the best attack reads", ylabel="accuracy, mean of four tasks", xlim=(-0.03, 1.6))
    axes.set_ylim(top=max(below.values()) + 0.005)  # labels above the axes wouldn't be drawn
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


@dataclass(frozen=True)
class Row:
    """One design in the picture that compares all: what is shown, and how good it is, 0 to 1, for each column."""

    name: str
    cells: list[tuple[str, float]]


COLUMNS = [
    "texts: read by the\nbest attack",
    "labels: AUC of the\nbest attack",
    "provider's weights\nthe client gets",
    "utility",
    "bytes for a text\nand epoch",
]


def label_rows() -> list[Row]:
    """Measured on SST-2 with MiniLM, adapters on all layers (docs/labels/results.md)."""
    rows = []
    sst2 = load("sst2")
    lora = sst2["lora+first=0+lr=0.003"]
    top = np.mean(lora.values(lambda run: run["test"]["accuracy"]))
    for name, label in (
        ("lora+first=0+lr=0.003", "plain LoRA"),
        ("padded-lora+epochs=2+lr=0.001+warmup=60+first=0", "padded LoRA"),
    ):
        arm = sst2[name]
        accuracy = float(np.mean(arm.values(lambda run: run["test"]["accuracy"])))
        audits = [run["audit"] for run in arm.runs]
        leak = float(np.mean([max([*a["unsupervised"].values(), *a["gradients"].values()]) for a in audits]))
        cells = [("100%: sent\nin the clear", 0.0), (f"{leak:.2f}", _good_auc(leak)), ("none", 1.0)]
        cells += [(f"{100 * (accuracy - top):+.1f} points", _good_points(100 * (accuracy - top)))]
        rows.append(Row(label, [*cells, ("tokens, then\nactivations", 0.7)]))
    return rows


def _good_auc(auc: float) -> float:
    return float(np.clip((1 - auc) / 0.5, 0, 1))


def _good_points(lost: float) -> float:
    return float(np.clip(1 + lost / 6, 0, 1))


def _good_bytes(count: float) -> float:
    return float(np.clip(1 - np.log10(max(count, 1) / 1e3) / 3, 0, 1))


def compared(found: dict[str, Arm]) -> Figure:
    """All designs on five scales, measured numbers in cells."""
    rows = label_rows()
    undefended = found[UNDEFENDED]
    for name in ordered(found):
        arm = found[name]
        if name.startswith(("zero-shot", "full", "lora")):
            continue
        best = arm.best_attack
        if best is None and not arm.silent:
            continue
        offline = arm.silent
        read = 0.0 if offline else best["accuracy"][0]
        lost = 100 * difference(arm, undefended)[0]
        moved = bytes_of(arm) / arm.runs[0]["train_examples"]
        weights = arm.runs[0]["weights_shared"]
        cells = [
            ("nothing is sent" if offline else f"{read:.0%}", 1 - read),
            (
                "nothing is sent" if offline else "read with\nthe texts" if read > 0.5 else "hardly",
                1.0 if offline else 1 - read,
            ),
            (f"{weights:.0%}", 1 - weights),
            (f"{lost:+.1f} points", _good_points(lost)),
            ("0" if offline else f"{moved:,.0f}", 1.0 if offline else _good_bytes(moved)),
        ]
        rows.append(Row(arm.label, cells))
    figure, axes = plt.subplots(figsize=(9.5, 0.52 * len(rows) + 1.1), layout="constrained")
    values = np.array([[good for _, good in row.cells] for row in rows])
    axes.imshow(values, cmap="RdYlGn", vmin=-0.25, vmax=1.25, aspect="auto", alpha=0.75)
    for y, row in enumerate(rows):
        for x, (text, _) in enumerate(row.cells):
            axes.text(x, y, text, ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(COLUMNS)), COLUMNS, fontsize=8)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.axhline(1.5, color="black", linewidth=1)
    axes.spines[:].set_visible(False)
    return figure


def save(figure: Figure, name: str) -> None:
    """As SVG and PNG, the same bytes each time."""
    for suffix in ("svg", "png"):
        figure.savefig(PICTURES / f"{name}.{suffix}", dpi=130, metadata={"Date": None} if suffix == "svg" else None)
    plt.close(figure)


def main() -> None:
    found = arms()
    once = {name: arm for name, arm in found.items() if name != DEFENDED}  # which is there with fewer attacks too
    for name, table in (
        ("utility", utility_table(found)), ("privacy", privacy_table(found)), ("costs", cost_table(once)),
        ("undefended", undefended_attacks(found)), ("decorrelated", defended_attacks(found)),
        ("whole-test", whole_test_table()),
    ):  # fmt: skip
        fill(PAGE, name, table)
    save(tradeoff(once), "read-and-utility")
    save(compared(once), "all-designs")
    if "online" in found:
        fill(PAGE, "bytes", bytes_sentence(found))
    fill(PAGE, "membership", membership_table())
    fill(PAGE, "plugged", deployed_sentence())


if __name__ == "__main__":
    main()
