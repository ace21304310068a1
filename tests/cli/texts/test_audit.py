"""`blindtune texts audit`: from a recorded run of a cut decoder to what its server could read."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click import unstyle
from click.testing import Result
from typer.testing import CliRunner

import blindtune as bt
from blindtune.cli import app
from tests.audit.texts.test_attacks import save


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "160"})


@pytest.fixture(scope="module")
def public(film_sentences, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("public") / "public.txt"
    path.write_text("\n".join(film_sentences[100:600]))
    return path


@pytest.fixture(scope="module")
def trained(start_server, film_sentences, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Name -> transcript and ground truth: plain split learning; noise larger than what it covers; tokens in groups; a
    bottom that has learned much. The folder beside them is the client's."""
    folder = tmp_path_factory.mktemp("runs")
    model = save("llama", folder / "llama", film_sentences[:600])
    short = [s for s in film_sentences[:100] if 4 <= len(s.split()) <= 14]
    rows = [{"question": s, "choices": ["good", "bad"], "answer": i % 2} for i, s in enumerate(short)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    runs: dict[str, tuple[Path, Path]] = {}
    designs = {
        "plain": ("online",),
        "noisy": ("online", "--set", "noise=20"),
        "grouped": ("gradfree", "--set", "anonymity=8"),
        "tuned": ("online", "--tune", "full", "--lr", "0.03", "--set", "decorrelation_weight=8"),
    }
    for name, options in designs.items():
        seen, ground_truth = folder / f"{name}-seen", folder / f"{name}-truth.jsonl"
        with start_server(model, cut=2, record=seen) as server:
            done = call(
                "texts", "train", "--server", server.url, "--data", folder / "questions.jsonl", "--design",
                *options, "--steps", 12 if name == "tuned" else 4, "--batch-size", 8, "--max-length", 24,
                "--validation", 0, "--output", folder / name, "--ground-truth", ground_truth,
            )  # fmt: skip
        assert done.exit_code == 0, done.output
        runs[name] = (seen, ground_truth)
    return runs


@cache
def audit(run: tuple[Path, Path], public: Path, *options: object) -> tuple[str, dict[str, Any]]:
    """What the command prints, and its JSON. Each audit runs once."""
    results = run[0].with_name(f"{run[0].name}-audit.json")
    files = [run[0], "--ground-truth", run[1], "--public", public, "--json", results]
    done = call("texts", "audit", *files, "--sequences", 8, *options)
    assert done.exit_code == 0, done.output
    return done.output, json.loads(results.read_text())


def test_what_was_sent_for_validation_is_known_and_left_out(start_server, tmp_path, film_sentences, public):
    model = save("llama", tmp_path / "llama", film_sentences[:600])
    short = [s for s in film_sentences[:200] if 4 <= len(s.split()) <= 14]
    rows = [{"question": s, "choices": ["good", "bad"], "answer": i % 2} for i, s in enumerate(short)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    seen, ground_truth = tmp_path / "seen", tmp_path / "truth.jsonl"
    with start_server(model, cut=2, record=seen) as server:
        done = call(
            "texts", "train", "--server", server.url, "--data", tmp_path / "questions.jsonl", "--design", "online",
            "--steps", 2, "--batch-size", 8, "--max-length", 24, "--output", tmp_path / "out",
            "--ground-truth", ground_truth,
        )  # fmt: skip
    assert done.exit_code == 0, done.output
    parts = [json.loads(line)["part"] for line in ground_truth.read_text().splitlines()]
    assert parts.count("train") == 2
    assert parts.count("validation") > 2
    _, found = audit((seen, ground_truth), public)
    assert {row["stage"] for row in found["attacks"]} == {"start", "end"}  # two messages hold 16 texts


def test_texts_of_validation_are_not_taken_for_ones_that_were_sent_once(start_server, tmp_path, film_sentences, public):
    model = save("llama", tmp_path / "llama", film_sentences[:600])
    short = [s for s in film_sentences[:200] if 4 <= len(s.split()) <= 14]
    rows = [{"question": s, "choices": ["good", "bad"], "answer": i % 2} for i, s in enumerate(short[:40])]
    data, others = tmp_path / "questions.jsonl", tmp_path / "others.jsonl"
    data.write_text("\n".join(map(json.dumps, rows[:8])))
    others.write_text("\n".join(map(json.dumps, rows[8:])))
    seen, ground_truth, out = tmp_path / "seen", tmp_path / "truth.jsonl", tmp_path / "out"
    with start_server(model, cut=2, record=seen) as server:
        done = call(
            "texts", "train", "--server", server.url, "--data", data, "--validation", others, "--design", "online",
            "--steps", 3, "--batch-size", 8, "--max-length", 24, "--lr", 1e-6, "--output", out,
            "--ground-truth", ground_truth, "--set", "noise=0.05", "--set", "clip_norm=4",
        )  # fmt: skip
    assert done.exit_code == 0, done.output
    printed, _ = audit((seen, ground_truth), public, "--run", out)
    assert "3 messages of a text are linked" in printed


def best(rows: list[dict[str, Any]], *, floor: bool = False) -> float:
    return max(row["metrics"]["accuracy"][0] for row in rows if row["floor"] is floor)


def test_plain_split_learning_is_read(trained, public):
    printed, found = audit(trained["plain"], public)
    assert found["valid"]
    assert best(found["attacks"]) > 0.8
    assert "The server can read" in printed


def test_noise_is_what_stops_it(trained, public):
    _, found = audit(trained["noisy"], public)
    assert found["valid"]  # on the same texts, undefended
    assert best(found["attacks"]) < best(found["attacks"], floor=True) + 0.15


def test_groups_of_tokens_are_what_hides_texts_from_who_knows_of_them_too(trained, public):
    seen, ground_truth = trained["grouped"]
    printed, found = audit((seen, ground_truth), public, "--run", seen.with_name("grouped"))
    assert found["valid"]  # the same attacks read the same texts where they aren't in groups
    assert max(best(found["attacks"]), best(found["adaptive"])) < 0.75 < best(found["control"])
    assert "adaptive" in printed
    assert f"The server can read {max(best(found['attacks']), best(found['adaptive'])):.0%}" in printed


def test_three_lines_of_python_give_the_numbers_of_the_command(trained, public):
    seen, ground_truth = trained["grouped"]
    run = seen.with_name("grouped")
    printed, expected = audit((seen, ground_truth), public, "--run", run)
    found = bt.audit_texts(seen, ground_truth, [public], adaptive=bt.ShadowClient(run), sequences=8)
    numbers, expected = without_times(found.to_json()), without_times(expected)
    for attacker in ("attacks", "control"):
        assert numbers[attacker] == expected[attacker]
    # the adaptive attacker draws groups of its own, others in each process
    assert [(a["attack"], a["stage"]) for a in numbers["adaptive"]] == [
        (a["attack"], a["stage"]) for a in expected["adaptive"]
    ]
    assert expected["sentence"] in printed


def without_times(found: Any) -> Any:
    """The numbers of an audit but for the seconds that it took."""
    if isinstance(found, dict):
        return {name: without_times(value) for name, value in found.items() if name != "seconds"}
    return [without_times(value) for value in found] if isinstance(found, list) else found


def test_who_trains_a_shadow_client_follows_a_bottom_that_has_moved(trained, public):
    seen, ground_truth = trained["tuned"]
    _, found = audit((seen, ground_truth), public, "--run", seen.with_name("tuned"))
    end = {
        name: max(r["metrics"]["accuracy"][0] for r in found[name] if r["stage"] == "end" and not r["floor"])
        for name in ("attacks", "adaptive")
    }
    print(end)
    assert end["adaptive"] >= end["attacks"]


@pytest.mark.parametrize("content", [None, "{ cut off", "[]", "{}"])
def test_a_run_that_tells_nothing_is_refused_before_any_attack(trained, public, tmp_path, content):
    if content is not None:
        (tmp_path / "blindtune.json").write_text(content)
    seen, ground_truth = trained["plain"]
    done = call("texts", "audit", seen, "--ground-truth", ground_truth, "--public", public, "--run", tmp_path)
    assert done.exit_code == 1
    assert "blindtune.json" in done.output
    assert "to learn from" not in done.output


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (lambda seen, told, public: [seen, "--ground-truth", told], 1, "--public"),
        (lambda seen, told, public: [seen, seen, "--ground-truth", told, "--public", public], 2, "extra argument"),
        (lambda seen, told, public: [seen], 2, "--ground-truth"),
        (
            lambda seen, told, public: [seen, "--ground-truth", public.with_name("no"), "--public", public],
            1,
            "There is no file",
        ),
    ],
    ids=["no-public-text", "two", "nothing", "no-ground-truth"],
)
def test_mistakes(trained, public, options, code, says):
    done = call("texts", "audit", *options(*trained["plain"], public))
    assert done.exit_code == code
    assert says in unstyle(done.output).replace("\n", " ")


def test_the_ground_truth_of_another_run(trained, public):
    done = call("texts", "audit", trained["plain"][0], "--ground-truth", trained["noisy"][1], "--public", public)
    assert done.exit_code == 1
    assert "this very run" in done.output.replace("\n", " ")
