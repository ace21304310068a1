"""What the tuned ends of a finished Offline run tell about their questions, and how they do at the provider's.

python -m experiments.texts.handed_over [--arms offline,offsite] [--seeds 1,2] [--device cuda]

`blindtune texts membership` and `blindtune texts deploy` as a user runs them, on a server of their own.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from blindtune.cli.processes import local_servers
from blindtune.data.tables import read_table
from experiments.texts.run import CUT, MODEL, RESULTS, WORK, Arm, command, emulator
from experiments.texts.tasks import TASKS, path_of, write_questions

MOST, TESTED = 400, 60


def write_others(work: Path) -> Path:
    """As many questions of the same files that weren't trained on, in the same mixture."""
    members = {json.loads(line)["question"] for line in (work / "train.jsonl").read_text().splitlines()}
    rows: list[dict[str, Any]] = []
    for task in TASKS:
        left = [r for r in read_table(str(path_of(task, "train")), "train").to_pylist() if r["question"] not in members]
        rows += random.Random(0).sample(left, MOST // 4)
    random.Random(0).shuffle(rows)
    path = work / "others.jsonl"
    write_questions(path, rows)
    return path


def measure(arm: str, seed: str, device: str) -> dict[str, Any]:
    """Membership around the emulator and around the real trunk, then that on a few test questions."""
    work = WORK / f"{arm}-seed{seed}"
    others, test = write_others(work), work / "some-test.jsonl"
    write_questions(test, read_table(str(path_of("sciq", "test")), "test").to_pylist()[:TESTED])
    serve = ["--cut", f"{CUT.bottom},{CUT.top}", "--emulator", str(emulator(Arm.parse(arm))), "--device", device]
    with local_servers(MODEL, [work / "handed-over"], threads=1, more=serve) as (server,):
        out, at = str(work / "out"), ["--server", server.url]
        used, told = work / "deployed.json", {name: work / f"membership-{name}.json" for name in ("emulator", "trunk")}
        files = ["--members", str(work / "train.jsonl"), "--others", str(others), "--limit", str(MOST)]
        files += ["--device", device]
        for around, path in told.items():
            command("texts", "membership", out, *at, *files, "--around", around, "--json", str(path))
        prompt = "Question: What gas do plants take in from the air?\nAnswer:"
        used_for = ["--data", str(test), "--prompt", prompt, "--max-new-tokens", "8", "--json", str(used)]
        command("texts", "deploy", out, *at, *used_for)
    membership = {around: json.loads(path.read_text()) for around, path in told.items()}
    return {"arm": arm, "seed": int(seed), "membership": membership, "deployed": json.loads(used.read_text())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", default="offline,offsite")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    folder = RESULTS / "handed-over"
    folder.mkdir(parents=True, exist_ok=True)
    for arm in options.arms.split(","):
        for seed in options.seeds.split(","):
            path = folder / f"{arm}-seed{seed}.json"
            if not path.exists():
                path.write_text(json.dumps(measure(arm, seed, options.device), indent=1) + "\n")


if __name__ == "__main__":
    main()
