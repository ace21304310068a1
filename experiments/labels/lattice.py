"""The attack on the low-order bits of noise, before and after it lies on a lattice: table of docs/labels/guarantee.md.

python -m experiments.labels.lattice

Old constructions are those of `tests.audit.constructions`; new ones are the package's own. The attacker knows every
secret but the noise and, in the old construction, the coefficient, unless a row says so. About three minutes on a core.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blindtune.audit.labels.lattice import (
    blind_signs,
    label_scores,
    recover_coefficient,
    row_scores,
)
from blindtune.audit.statistics import auc
from blindtune.privacy.token_noise import add_token_noise
from experiments.figures import fill, header
from experiments.labels.run import RESULTS
from tests.audit.constructions import Array, generator, new_split, old_split, old_token_noise

PAGE = Path(__file__).parents[2] / "docs" / "labels" / "guarantee.md"
FILE = RESULTS / "lattice.json"
SIGMA, DIM, TRIALS = 1000.0, 384, 12
Split = Callable[[Array, float, tuple[object, ...]], tuple[Array, float]]


def old(gradient: Array, sigma: float, context: tuple[object, ...]) -> tuple[Array, float]:
    """Carrier, and |α| as it was drawn: from 1 to 1.25."""
    carrier, alpha = old_split(gradient, sigma, generator(*context))
    return carrier, abs(alpha)


def new(gradient: Array, sigma: float, context: tuple[object, ...]) -> tuple[Array, float]:
    return new_split(gradient, sigma, generator(*context))[0], 1.0


def coefficient(split: Split) -> int:
    """Draws of 12 in which |α| is found from eight rows whose gradients are known."""
    found = 0
    for trial in range(TRIALS):
        gradient = np.random.default_rng(trial).normal(0, 0.05, (8, DIM)).astype(np.float32)
        carrier, alpha = split(gradient, SIGMA, ("coefficient", trial))
        value = recover_coefficient(carrier, gradient)
        found += value is not None and abs(value - alpha) < 1e-8
    return found


def decoded(split: Split, name: str, seed: int, shape: tuple[int, int], unknown: int) -> float:
    """Of the first `unknown` labels of a share, those that are decoded, all others known; the sum over 12 shares.

    Where several labels have the best score, the attacker draws one of them: the right one counts in part.

    Args:
        shape: rows of a share, and classes.
    """
    rows, classes = shape
    right, first = 0.0, np.arange(unknown)
    for trial in range(TRIALS):
        random = np.random.default_rng(seed + trial)
        hypotheses = random.normal(0, 0.05, (rows, classes, DIM)).astype(np.float32)
        labels = random.integers(0, classes, rows)
        carrier, _ = split(hypotheses[np.arange(rows), labels], SIGMA, (name, trial))
        known = np.where(np.arange(rows) < unknown, -1, labels)
        scores = label_scores(carrier, hypotheses, known=known)[:unknown]
        best = scores == scores.max(1, keepdims=True)
        right += float((best[first, labels[:unknown]] / best.sum(1)).sum())
    return right


def one_label(split: Split) -> float:
    """Labels of 12 that are decoded, one in each share of 24 rows with two classes."""
    return decoded(split, "one", 100, (24, 2), 1)


def eight_labels(split: Split) -> float:
    """Labels of 8 that are decoded at once, mean over 12 shares of 32 rows with three classes."""
    return decoded(split, "eight", 200, (32, 3), 8) / TRIALS


def blind(split: Split) -> float:
    """AUC with no label known and clipping that binds (C = .5, 64 rows, ± one direction), given |α|; mean of 12.

    The direction's sign can't be known, so an AUC below .5 counts as one above.
    """
    found: list[float] = []
    for trial in range(TRIALS):
        random = np.random.default_rng(300 + trial)
        direction, labels = random.normal(size=DIM), random.integers(0, 2, 64)
        direction *= 0.5 / np.linalg.norm(direction)
        gradient = np.outer(2 * labels - 1, direction).astype(np.float32)
        carrier, alpha = split(gradient, SIGMA, ("blind", trial))
        value = auc(blind_signs(carrier, alpha, 0.5), labels == 1)
        found.append(max(value, 1 - value))
    return float(np.mean(found))


def rows(noisy: Callable[[Array], Array]) -> float:
    """AUC of telling rows of hidden states apart that differ by .01, noise 1; 400 rows."""
    random = np.random.default_rng(0)
    first, way = random.normal(size=(2, 400, DIM))
    first *= 0.5 / np.linalg.norm(first, axis=1, keepdims=True)
    way *= 0.01 / np.linalg.norm(way, axis=1, keepdims=True)
    pairs, sent = np.stack([first, first + way], axis=1).astype(np.float32), random.integers(0, 2, 400)
    scores = row_scores(noisy(pairs[np.arange(400), sent]), pairs)
    return auc(scores[:, 1] - scores[:, 0], sent == 1)


def old_rows(values: Array) -> Array:
    return old_token_noise(values, 1.0, 1.0, generator("rows"))


def new_rows(values: Array) -> Array:
    return add_token_noise(torch.from_numpy(values), 1.0, 1.0, generator=generator("rows")).numpy()


def measure() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, split, noisy in (("old", old, old_rows), ("new", new, new_rows)):
        values: dict[str, Any] = {}
        for attack in (coefficient, one_label, eight_labels, blind):
            values[attack.__name__] = attack(split)
            print(name, attack.__name__, values[attack.__name__], flush=True)
        values["rows"] = rows(noisy)
        print(name, "rows", values["rows"], flush=True)
        found[name] = values
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    lines = header("attack on one operator's bytes", "noise rounded to float32", "noise on a lattice", "chance")
    for key, words, form, chance in (
        ("coefficient", "the secret coefficient of a share, eight gradients known", "{:.0f} of 12", "0 of 12"),
        ("one_label", "one label, all others known", "{:g} of 12", "6 of 12"),
        ("eight_labels", "eight labels at once, three classes, 24 others known", "{:.1f} of 8", "2.7 of 8"),
        ("blind", "all labels of a batch, none known, clipping binds, coefficient known", "AUC {:.2f}", "0.5"),
        (
            "rows",
            "two rows of hidden states that are .01 apart under noise of 1",
            "AUC {:.3f}",
            "0.5 (bound 0.503)",
        ),
    ):
        before, after = (form.format(found[name][key]) for name in ("old", "new"))
        lines.append(f"| {words} | {before} | {after} | {chance} |")
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    FILE.write_text(json.dumps(measure(), indent=2) + "\n")
    fill(PAGE, "attacks", table(json.loads(FILE.read_text())))


if __name__ == "__main__":
    main()
