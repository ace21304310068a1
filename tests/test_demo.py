"""The demo, shortened: operators see texts alone with features; the attack succeeds against plain LoRA, and fails
against padded LoRA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blindtune.audit.observe import read_view
from blindtune.wire import Transcript
from tests.conftest import CACHE

pytestmark = pytest.mark.timeout(1200)  # the longest of all tests, beside others on the same two cores
SHORT = ["--steps", "40", "--train", "1280", "--test", "200", "--attacked", "300"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """Results, output folder and what was printed."""
    folder = tmp_path_factory.mktemp("demo")
    command = [
        sys.executable,
        "-m",
        "blindtune",
        "demo",
        *SHORT,
        "--cache",
        str(CACHE),
        "--output",
        str(folder / "out"),
    ]
    result = subprocess.run(
        [*command, "--json", str(folder / "demo.json")],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "140"},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads((folder / "demo.json").read_text()), folder / "out", result.stdout


def test_the_attack_succeeds_against_plain_lora(demo):
    lora = demo[0]["methods"]["lora"]
    assert lora["gradients_auc"] > 0.95
    assert lora["activations_and_shifts_auc"] > 0.8


def test_the_same_attacks_fail_against_padded_lora(demo):
    """The search for two humps picks one of ten directions at each look; by luck some say what the texts say."""
    lora, padded = (demo[0]["methods"][name] for name in ("lora", "padded-lora"))
    by_attack = padded["activations_and_shifts_auc_by_attack"]
    assert max(by_attack[name] for name in ("spectral", "norm", "k-means")) < 0.68
    assert padded["activations_and_shifts_auc"] < demo[0]["frozen_attack_auc"] + 0.12
    assert padded["activations_and_shifts_auc"] < lora["activations_and_shifts_auc"] - 0.1
    assert padded["gradients_auc"] < 0.6


def test_some_known_labels_help_no_more_than_on_the_frozen_model(demo):
    lora, padded = (demo[0]["methods"][name]["few_label_auc"] for name in ("lora", "padded-lora"))
    frozen = demo[0]["frozen_few_label_auc"]
    for known in frozen:
        assert padded[known] < frozen[known] + 0.05
        assert lora[known] > frozen[known] + 0.05


def test_the_guarantees_are_reported(demo):
    padded = demo[0]["methods"]["padded-lora"]
    assert 0.2 < padded["mu"] <= padded["mu_budget"] == 0.25
    assert 0.5 < padded["epsilon"] < 1
    assert 0 < padded["information_bits"] < 0.02


def test_the_headline_is_the_strongest_attack_also_where_it_succeeds(demo):
    for method in demo[0]["methods"].values():
        assert method["best_attack_auc"] >= max(method["activations_and_shifts_auc_by_attack"].values())
        assert method["best_attack_auc"] >= method["gradients_auc"]


def test_the_json_has_what_scripts_read(demo):
    result = demo[0]
    for method in ("lora", "padded-lora"):
        assert {"accuracy", "best_attack_auc", "seconds", "bytes_per_step"} <= set(result["methods"][method])
    assert 0.65 < result["features"]["accuracy"] < 0.9
    assert result["methods"]["padded-lora"]["accuracy"] > 0.7


def test_operators_saw_the_texts_of_features_and_no_adapter(demo):
    first, second = (Transcript(demo[1] / "seen" / name) for name in ("operator-A", "operator-B"))
    view = read_view(first, "operator A", tenant="features")
    assert len(view.first_seen) > 1400  # training and test texts, some of them equal
    assert not view.checkpoints
    assert "features" not in {event.tenant for event in second.events}


def test_reports_and_checkpoints_are_where_the_demo_says(demo):
    _, folder, printed = demo
    for name in ("lora", "padded-lora"):
        assert (folder / f"report-{name}.html").is_file()
        assert str(folder / f"report-{name}.html") in printed
        assert (folder / name / "model" / "blindtune.json").is_file()


def test_no_server_is_left_behind(demo):
    for log in demo[1].rglob("*.log"):
        assert "Traceback" not in log.read_text()
    folder = str(demo[1])
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in processes.splitlines() if "blindtune serve" in line and folder in line]
