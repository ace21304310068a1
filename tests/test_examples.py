"""The examples run as they are written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import blindtune as bt
from blindtune.labels import adapter_config
from tests.conftest import Server

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_a_loop_of_ones_own(two_servers: list[Server], tmp_path: Path):
    """But for the addresses, which it expects to be free."""
    program = (EXAMPLES / "own_loop.py").read_text()
    for port, server in zip((8001, 8002), two_servers, strict=True):
        program = program.replace(f"http://127.0.0.1:{port}", server.url)
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    mu = [float(value) for value in re.findall(r"'mu': ([\d.]+)", result.stdout)]
    assert len(mu) == 10
    assert mu == sorted(mu)
    assert 0.2 < mu[-1] <= 0.25
    out = tmp_path / "out" / "own-loop"
    backbone = bt.Backbone([server.url for server in two_servers], adapter=adapter_config(str(out)))
    model = bt.PrivateModel.from_pretrained(out, backbone, predict_only=True)
    assert model(["a dull ache in the lower back", "sleeping well"]).logits.argmax(-1).tolist() == [1, 0]
    backbone.close()


def test_private_texts(tiny_causal: dict[str, Path], tmp_path: Path):
    """But for the model, which it expects to be SmolLM2."""
    program = (EXAMPLES / "private_texts.py").read_text().replace('"smollm2"', repr(str(tiny_causal["llama"])))
    program = program.replace("keep=6", "keep=1").replace("Cut(2, 2)", "Cut(1, 1)")
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    losses = [float(value) for value in re.findall(r"'task': ([\d.]+)", result.stdout)]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert "requests to the provider while training: 0" in result.stdout
