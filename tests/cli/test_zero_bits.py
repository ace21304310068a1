"""The commands with methods that send nothing about labels: one server, no steps, and no text twice."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from blindtune.training import LabelsSummary, read_summary
from tests.processes import run


@pytest.fixture(scope="module")
def files(film_examples, tmp_path_factory) -> dict[str, Path]:
    """Single texts, and pairs of texts, with labels."""
    folder = tmp_path_factory.mktemp("data")
    notes, pairs = folder / "notes.csv", folder / "pairs.csv"
    with notes.open("w", newline="") as file:
        rows = [
            [t, ["sick", "well"][label]] for t, label in zip(film_examples.texts, film_examples.labels, strict=True)
        ]
        csv.writer(file).writerows([["note", "diagnosis"], *rows[:120]])
    with pairs.open("w", newline="") as file:
        rows = [[film_examples.texts[i], film_examples.texts[i + i % 2], i % 2] for i in range(60)]
        csv.writer(file).writerows([["one", "two", "label"], *rows])
    return {"notes": notes, "pairs": pairs}


def train(server, data: list[object], out: Path, *options: object, check: bool = True):
    bert = ["--server", server.url, "--model", "bert", "--max-length", "32"]
    return run("labels", "train", *bert, *data, "--output", out, *options, check=check)


@pytest.mark.parametrize("method", ["features", "side"])
def test_one_server_is_enough_and_the_second_run_sends_nothing(tiny_server, files, tmp_path, method):
    data = ["--data", files["notes"], "--text", "note", "--label", "diagnosis"]
    sent = []
    for number in (1, 2):
        out, results = tmp_path / f"out{number}", tmp_path / f"{number}.json"
        common = ["--method", method, "--json", results, "--store", tmp_path / "store"]
        done = train(tiny_server, data, out, *common, *(["--set", "epochs=1"] if method == "side" else []))
        assert "sees texts, each once: nothing about labels" in done.stdout
        numbers = json.loads(results.read_text())
        assert numbers["validation"]["accuracy"] > 0
        assert numbers["method"] == method
        assert "mu" not in numbers
        sent.append(numbers["bytes_received"])
    assert sent[1] < 0.5 * sent[0]  # the tokenizer and the model's description alone

    predicted = tmp_path / "predicted.csv"
    options = ["--server", tiny_server.url, "--data", files["notes"], "--text", "note", "--store", "none"]
    run("labels", "predict", tmp_path / "out1", *options, "--output", predicted)
    with predicted.open() as file:
        assert len(list(csv.DictReader(file))) == 120


def test_the_default_method_sends_nothing_about_labels(tiny_server, files, tmp_path):
    data = ["--data", files["notes"], "--text", "note", "--label", "diagnosis", "--store", "none"]
    done = train(tiny_server, data, tmp_path / "out", "--set", "classifier=logistic")
    assert "sees texts, each once: nothing about labels" in done.stdout
    assert read_summary(tmp_path / "out", LabelsSummary).method == "features"


def test_pairs_are_read_as_one_sequence_and_apart(tiny_server, files, tmp_path):
    data = ["--data", files["pairs"], "--text", "one", "--text", "two"]
    train(tiny_server, data, tmp_path / "out", "--method", "features", "--store", "none", "--set", "classifier=rbf")
    summary = json.loads((tmp_path / "out" / "blindtune.json").read_text())
    assert (summary["pairs"], summary["readout"]["layers"]) == ("both", [0, 1, 2, 3])
    assert summary["head"] == "KernelHead"
    predict = ["--server", tiny_server.url, *data, "--output", tmp_path / "predicted.csv"]
    run("labels", "predict", tmp_path / "out", *predict)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "features", "--lr", "0.1"], "features isn't trained in steps, so it has no use for --lr"),
        (["--method", "side", "--steps", "3"], "no use for --steps"),
        (["--method", "features", "--training", "warmup=3"], "no use for --training warmup"),
        (["--method", "features", "--readout", "9"], "There is no layer 9"),
        (["--method", "features", "--readout", "low"], "--readout low can't be read"),
        (["--method", "features", "--set", "layers=low"], "no layers = 'low'"),
        (["--method", "side", "--readout", "all:mean"], "reads every token"),
    ],
)
def test_wrong_options_are_answered_before_a_text_is_sent(tiny_server, files, tmp_path, arguments, words):
    data = ["--data", files["notes"], "--text", "note", "--label", "diagnosis"]
    refused = train(tiny_server, data, tmp_path / "out", *arguments, check=False)
    assert refused.returncode == 1
    said = " ".join((refused.stdout + refused.stderr).split())
    assert words in said
    assert "Remedy:" in said
    assert "Traceback" not in said


def test_a_damaged_store_is_named_and_nothing_is_lost(tiny_server, files, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    (store / "features.sqlite").write_bytes(b"not a database " * 50)
    data = ["--data", files["notes"], "--text", "note", "--label", "diagnosis"]
    options = ["--method", "features", "--store", store]
    refused = train(tiny_server, data, tmp_path / "out", *options, check=False)
    assert refused.returncode == 1
    said = " ".join((refused.stdout + refused.stderr).split())
    assert "features.sqlite can't be used" in said
    assert (store / "features.sqlite").read_bytes() == b"not a database " * 50


def test_a_finished_run_is_not_resumed(tiny_server, files, tmp_path):
    data = ["--data", files["notes"], "--text", "note", "--label", "diagnosis"]
    options = ["--method", "features", "--set", "classifier=logistic", "--store", "none"]
    train(tiny_server, data, tmp_path / "out", *options)
    refused = train(tiny_server, data, tmp_path / "out", "--resume", check=False)
    assert "holds a finished run" in " ".join((refused.stdout + refused.stderr).split())


def test_the_seed_of_a_run_is_the_side_networks_too(tiny_server, files, tmp_path):
    data = ["--data", files["notes"], "--text", "note", "--label", "diagnosis"]
    options = ["--method", "side", "--set", "epochs=1", "--set", "width=4", "--training", "seed=5"]
    train(tiny_server, data, tmp_path / "out", *options)
    assert json.loads((tmp_path / "out" / "blindtune.json").read_text())["options"]["head_seed"] == 5
