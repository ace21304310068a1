"""The demo, shortened: the attack succeeds against plain LoRA and fails against P3EFT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CACHE

SHORT = ["--steps", "75", "--train", "2400", "--test", "400", "--points", "3", "--attacked", "1000"]


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


def test_the_same_attack_fails_against_p3eft(demo):
    p3eft = demo[0]["methods"]["p3eft"]
    assert p3eft["activations_and_shifts_auc"] < 0.7
    assert p3eft["gradients_auc"] < 0.6
    assert p3eft["best_attack_auc"] < demo[0]["methods"]["lora"]["activations_and_shifts_auc"] - 0.1
    assert 0 < p3eft["gradient_channel_mu"] < 0.1


def test_the_json_has_what_scripts_read(demo):
    result = demo[0]
    for method in ("lora", "p3eft"):
        assert {"accuracy", "best_attack_auc", "seconds", "bytes_per_step"} <= set(result["methods"][method])
    assert 0.6 < result["frozen_accuracy"] < 0.9
    assert result["methods"]["p3eft"]["accuracy"] > 0.7


def test_reports_and_checkpoints_are_where_the_demo_says(demo):
    _, folder, printed = demo
    for name in ("lora", "p3eft"):
        assert (folder / f"report-{name}.html").is_file()
        assert str(folder / f"report-{name}.html") in printed
        assert (folder / name / "model" / "blindtune.json").is_file()


def test_no_server_is_left_behind(demo):
    for log in demo[1].rglob("*.log"):
        assert "Traceback" not in log.read_text()
    folder = str(demo[1])
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in processes.splitlines() if "blindtune serve" in line and folder in line]
