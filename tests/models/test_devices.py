"""Where models run: a device that isn't here is refused before a model is loaded or anything is sent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click import unstyle

from blindtune.errors import ConfigError
from blindtune.models import load_backbone
from blindtune.models.devices import find_device
from tests.cli.commands import run

ABSENT = ("cuda:99", "meta", "hpu", "nonsense", "")


@pytest.mark.parametrize("name", ABSENT)
def test_one_that_is_not_here_is_refused(name: str):
    with pytest.raises(ConfigError, match="no device") as refused:
        find_device(name)
    assert "cpu" in refused.value.remedy


def test_the_cpu_is_always_here():
    assert find_device("cpu") == torch.device("cpu")


def test_no_model_is_read_for_a_device_that_is_not_here():
    with pytest.raises(ConfigError, match="no device"):
        load_backbone("no/such-model", device="cuda:99")


@pytest.mark.parametrize(
    "command",
    [
        ["serve", "--model", "no/such", "--no-auth"],
        ["emulator", "build", "--model", "no/such", "--cut", 2, "--keep", 2, "--public", "DATA", "--key", "k",
         "--output", "o"],
        ["texts", "train", "--server", "http://127.0.0.1:9", "--data", "DATA", "--output", "out", "--design", "online"],
        ["texts", "membership", "DATA", "--server", "http://127.0.0.1:9", "--members", "DATA", "--others", "DATA"],
    ],
    ids=lambda command: " ".join(command[: 1 + (command[0] in ("emulator", "texts"))]),
)  # fmt: skip
def test_commands_say_so_before_they_connect(command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "a b c", "choices": ["d", "e"], "answer": 0}\n' * 4)
    done = run(*(data if part == "DATA" else part for part in command), "--device", "cuda:99", check=False)
    assert done.exit_code == 1
    assert "There is no device 'cuda:99' here" in done.stderr.replace("\n", " ")


def test_private_labels_have_no_device_because_their_model_runs_elsewhere(tmp_path: Path):
    done = run("labels", "train", "--server", "http://127.0.0.1:9", "--data", "no.csv", "--output", tmp_path / "out",
               "--method", "padded-lora", "--device", "cuda", check=False)  # fmt: skip
    assert done.exit_code == 2
    assert "No such option: --device" in unstyle(done.stderr)
