"""Progress of a run on the console."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from blindtune import labels, texts
from blindtune.cli.progress import StepBar, human_bytes, labels_status, texts_status


def labels_step(number: int, loss: float, **report: float) -> labels.Step:
    return labels.Step(number, {"task": loss}, 0.75, 1000, 500, 0.5, report)


def test_a_bar_begins_where_the_run_does_and_each_step_moves_it():
    written = io.StringIO()
    bar = StepBar(Console(file=written, force_terminal=True, width=120), "lora", labels_status)
    bar.on_train_begin(3, 10)
    bar.on_step_end(labels_step(4, 0.5))
    bar.on_step_end(labels_step(5, 0.25))
    bar.on_train_end()
    assert "lora" in written.getvalue()
    assert "5/10" in written.getvalue()
    assert "loss 0.375  acc 0.75  2.00 steps/s  1.5 kB/step" in written.getvalue()


def test_the_status_of_private_labels_says_what_was_spent():
    spent = {"mu": 0.1, "epsilon": 0.2, "delta": 1e-5}
    shown = labels_status([labels_step(1, 1.0, **spent, mu_budget=0.25)])
    assert shown.endswith("μ 0.100 of 0.25 (ε 0.200 at δ 1e-05)")
    shares = {f"gradient_channel_{name}": value for name, value in spent.items()}
    assert labels_status([labels_step(1, 1.0, **shares)]).endswith("μ 0.100 (shares) (ε 0.200 at δ 1e-05)")


def test_the_status_of_private_texts_averages_losses_over_recent_steps():
    steps = [
        texts.Step(number, {"task": float(number), "decorrelation": 0.5}, {"up": 1000, "down": 500}, 0.25, 0)
        for number in range(40)
    ]
    assert texts_status(steps) == "loss 29.500  decorrelation 0.500  4.00 steps/s  1.5 kB/step"


@pytest.mark.parametrize(
    ("count", "words"), [(999, "999 B"), (1536, "1.5 kB"), (2.5e6, "2.5 MB"), (3e9, "3.00 GB"), (4e12, "4000.00 GB")]
)
def test_bytes_are_said_in_units_of_a_thousand(count, words):
    assert human_bytes(count) == words
