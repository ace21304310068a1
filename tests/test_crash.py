"""A client is killed in the middle of steps, and resumed on other numbers of threads: its ledger misses nothing."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from blindtune.data import Examples
from blindtune.privacy.journal import JOURNAL
from blindtune.privacy.ledger import read_journal
from blindtune.wire import Transcript
from tests.conftest import StartServer

KILLS = int(os.environ.get("BLINDTUNE_KILLS", "3"))
"""Twenty take four to eight minutes: `BLINDTUNE_KILLS=20 pytest tests/test_crash.py`."""
STEPS = 15 * KILLS
LAUNCH = "from blindtune.cli import main; main()"


def test_the_ledger_counts_at_least_what_operators_have_recorded(
    start_server: StartServer, film_examples: Examples, tiny_models: dict[str, Path], tmp_path: Path
):
    """At every operator: each padded adapter, and each share with a gradient in it, has an entry of its own."""
    data, out, chance = tmp_path / "notes.csv", tmp_path / "out", random.Random(0)
    with data.open("w", newline="") as file:
        rows = zip(film_examples.texts[:96], film_examples.labels[:96], strict=True)
        csv.writer(file).writerows([("text", "label"), *rows])
    folders = {name: tmp_path / name for name in "ab"}
    with ExitStack() as stack:
        servers = [stack.enter_context(start_server(tiny_models["bert"], record=path)) for path in folders.values()]
        command = [
            sys.executable, "-c", LAUNCH, "labels", "train",
            *(part for server in servers for part in ("--server", server.url)),
            "--method", "padded-lora", "--data", str(data), "--output", str(out),
            "--steps", str(STEPS), "--batch-size", "8",
            "--training", "save_every=4", "--validation", "0", "--set", "check_every=5", "--set", f"steps={40 * STEPS}",
        ]  # fmt: skip
        for kill in range(KILLS):
            resume = ["--resume"] if (out / "resume.safetensors").exists() else []
            environment = {**os.environ, "OMP_NUM_THREADS": str(1 + kill % 2)}
            client = subprocess.Popen(
                [*command, *resume], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            wanted = lines(out) + chance.randint(12, 40)
            while lines(out) < wanted and client.poll() is None:
                time.sleep(0.01)
            assert client.poll() is None, client.communicate()
            time.sleep(chance.random() / 50)
            client.send_signal(signal.SIGKILL)
            client.communicate()
        urls = dict(zip(folders, (server.url for server in servers), strict=True))
    ledger = read_journal(out / JOURNAL)
    for name, folder in folders.items():
        transcript = Transcript(folder)
        adapters, shares = set(), set()
        for event in transcript.events:
            if event.kind == "adapter" and torch.count_nonzero(transcript.tensors(event)["weights"]):
                adapters.add(event.adapters[0])
            if event.kind == "backward":
                shares.add(hashed(transcript.tensors(event)["cotangents"]))
        account = ledger.seen(urls[name])
        assert len(adapters) > KILLS * 2
        assert len(adapters) <= account["adapter"] + 3 * account["check"]  # a probe sends three
        assert len(shares) <= account["share"] + account["check"]
    assert 0 < ledger.used() <= 1


def lines(out: Path) -> int:
    path = out / JOURNAL
    return path.read_bytes().count(b"\n") if path.exists() else 0


def hashed(tensor: torch.Tensor) -> int:
    return hash(tensor.numpy().tobytes())
