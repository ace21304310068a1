"""`blindtune texts membership` as a user runs it: ends tuned for long give their texts away, fresh ones don't."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from blindtune.wire import Transcript
from tests.cli.commands import run

WORDS = ["good", "bad", "fine", "long", "dark", "sweet", "funny", "slow"]


@pytest.fixture(scope="module")
def files(film_sentences, tmp_path_factory) -> list[Path]:
    """Two random parts of one set of questions: answers that nobody could guess."""
    short = [sentence for sentence in film_sentences if 4 <= len(sentence.split()) <= 9][:100]
    paths = [tmp_path_factory.mktemp("data") / name for name in ("members.jsonl", "others.jsonl")]
    dice = random.Random(0)
    rows = [{"prompt": text, "answer": " ".join(dice.choices(WORDS, k=2))} for text in short]
    for half, path in enumerate(paths):
        path.write_text("\n".join(map(json.dumps, rows[half::2])))
    return paths


def tune(emulated, files: list[Path], output: Path, steps: int) -> Path:
    run("texts", "train", "--server", emulated[0].url, "--data", files[0], "--task", "instruction",
        "--design", "offsite", "--output", output, "--steps", steps, "--batch-size", 16,
        "--max-length", 24, "--lr", 0.01, "--validation", 0)  # fmt: skip
    return output


def test_ends_that_were_tuned_for_long_give_their_texts_away(emulated, files, tmp_path):
    server, seen, key = emulated
    results = tmp_path / "results.json"
    found = {}
    for steps in (1, 150):
        output = tune(emulated, files, tmp_path / str(steps), steps)
        done = run("texts", "membership", output, "--server", server.url, "--members", files[0], "--others", files[1],
                   "--provider-key", key, "--json", results)  # fmt: skip
        found[steps] = json.loads(results.read_text())
    assert "tells members from others with AUC" in done.stdout
    assert "Memorized answers" in done.stdout
    best = {steps: max(f["auc"] for f in numbers["findings"]) for steps, numbers in found.items()}
    assert best[1] < 0.65
    assert best[150] > 0.9
    assert found[150]["memorized"][0] > found[150]["memorized"][1] + 0.3
    assert abs(found[150]["gap_before"]) < 0.3
    assert not Transcript(seen).events  # nothing was sent


def test_the_same_around_the_real_trunk(emulated, files, tmp_path):
    output = tune(emulated, files, tmp_path / "out", 60)
    numbers = {}
    for around in ("emulator", "trunk"):
        results = tmp_path / f"{around}.json"
        run("texts", "membership", output, "--server", emulated[0].url, "--members", files[0], "--others", files[1],
            "--around", around, "--limit", 40, "--json", results)  # fmt: skip
        numbers[around] = json.loads(results.read_text())
    assert numbers["trunk"]["members"] == numbers["emulator"]["members"] == 40
    assert numbers["trunk"]["gap"] != numbers["emulator"]["gap"]
    assert numbers["trunk"]["findings"][1]["auc"] > 0.7


def test_mistakes_in_one_sentence(emulated, cut_server, files, tmp_path):
    output = tune(emulated, files, tmp_path / "out", 1)
    both = ["--members", files[0], "--others", files[1]]
    done = run("texts", "membership", output, "--server", cut_server.url, *both, check=False)
    assert (done.exit_code, "--around trunk" in done.stderr.replace("\n", " ")) == (1, True)
    done = run("texts", "membership", output, "--server", emulated[0].url, *both, "--around", "oven", check=False)
    assert (done.exit_code, "Use emulator or trunk" in done.stderr) == (1, True)
    done = run("texts", "membership", output, "--server", emulated[0].url, *both, "--limit", 3, check=False)
    assert (done.exit_code, "are too few" in done.stderr) == (1, True)
    done = run("texts", "membership", output, "--server", emulated[0].url, *both, "--limit", 0, check=False)
    assert (done.exit_code, "limit = 0 is no count" in done.stderr) == (1, True)
