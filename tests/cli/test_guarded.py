"""`blindtune train --method guarded-…` as a user runs it."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from peft import PeftModel
from transformers import AutoModelForCausalLM

from blindtune.cli.progress import peak_memory, reset_peak_memory
from blindtune.client import Operator, RemotePlugin, Transport
from blindtune.methods.guarded import read_tuned
from blindtune.training.guarded import GuardedTrainer
from blindtune.training.shadow import Recipe
from blindtune.wire import Transcript
from tests.cli.commands import run

BLOCK = 2**30  # much more than what a process takes for the libraries that its first training imports
SMALL = ["--steps", "6", "--batch-size", "4", "--max-length", "24"]


@pytest.fixture(scope="module")
def questions(film_sentences, tmp_path_factory) -> Path:
    """Which word follows a sentence."""
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    short = [sentence for sentence in film_sentences if 4 <= len(sentence.split()) <= 12][:40]
    rows = [{"question": s, "choices": ["good", "bad", "fine"], "answer": i % 3} for i, s in enumerate(short)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def train(server: Any, questions: Path, method: str, output: Path, *options: object, check: bool = True) -> Result:
    arguments = ["--server", server.url, "--data", questions, "--method", method, "--output", output]
    return run("train", *arguments, *SMALL, *options, check=check)


def test_gradfree_from_a_file_to_a_peft_checkpoint(split_server, questions, tmp_path):
    out, results, truth = tmp_path / "out", tmp_path / "results.json", tmp_path / "truth.jsonl"
    assert b"x" * BLOCK  # as loading may need it: no cost of training
    loading = peak_memory()
    done = train(split_server, questions, "guarded-gradfree", out, "--json", results, "--truth", truth)
    assert "sees every token's hidden state (int8 up, int8 down), once for each text, and no gradient" in done.stdout
    numbers = json.loads(results.read_text())
    assert set(numbers["traffic"]) == {"s_A up", "s_B down"}
    assert 0 <= numbers["validation"]["accuracy"] <= 1
    assert numbers["client_flops"] > 0
    assert numbers["peak_memory_bytes"] > 10**8  # torch alone needs more
    assert numbers["peak_memory_bytes"] < loading - BLOCK / 2 or not reset_peak_memory()
    told = [json.loads(line) for line in truth.read_text().splitlines()]
    assert len({entry["forward"] for entry in told}) == len(told)
    assert [entry["part"] for entry in told] == ["train"] * 6 + ["validation"] * (len(told) - 6)
    assert len(told) > 6  # what was held out is sent to be scored
    assert stat.S_IMODE(truth.stat().st_mode) == 0o600
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(split_server.model), out)
    changed = [n for n, p in stock.named_parameters() if "lora_B" in n and p.abs().sum() > 0]
    assert {name.split(".layers.")[1][0] for name in changed} == {"3", "4"}  # the top's blocks


def test_classes_are_words_that_follow(split_server, film_examples, tmp_path):
    rows = [{"text": t, "label": int(y)} for t, y in zip(film_examples.texts, film_examples.labels, strict=True)]
    data, out, results = tmp_path / "reviews.jsonl", tmp_path / "out", tmp_path / "results.json"
    data.write_text("\n".join([json.dumps(row) for row in rows if 4 <= len(row["text"].split()) <= 12][:40]))
    classes = ["--task", "classification", "--classes", "bad,good", "--json", results]
    train(split_server, data, "guarded-gradfree", out, *classes, "--validation", data)
    scores = json.loads(results.read_text())["validation"]
    assert 0 <= scores["accuracy"] <= 1
    assert scores["loss"] > 0
    fields = json.loads((out / "blindtune.json").read_text())["fields"]
    assert (fields["kind"], fields["label"]) == ("classification", "label")
    done = run("plug-in", out, "--server", split_server.url, "--data", data, "--classes", "bad,good", "--json", results)
    assert "plug in accuracy" in done.stdout.replace("-", " ")
    assert json.loads(results.read_text())["plug_in"]["loss"] == pytest.approx(scores["loss"], abs=0.02)  # int8


def test_noise_is_announced_with_its_guarantee(split_server, questions, tmp_path):
    noisy = ["--set", "noise=0.5", "--set", "clip_norm=2.0", "--validation-fraction", 0]
    done = train(split_server, questions, "guarded-gradfree", tmp_path / "once", *noisy)
    assert "noise of 0.5 clipping norms on each value (μ = 4.00 for one row of a text, after 1 messages)" in done.stdout
    done = train(split_server, questions, "guarded-online", tmp_path / "each", *noisy, "--steps", 40)  # of 4, 40 texts
    assert "(μ = 8.00 for one row of a text, after 4 messages)" in done.stdout
    two_points = ["--set", "zo=true", "--steps", 40]
    done = train(split_server, questions, "guarded-gradfree", tmp_path / "zo", *noisy, *two_points)
    assert "(μ = 11.31 for one row of a text, after 8 messages)" in done.stdout


def test_a_run_that_goes_on(split_server, questions, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(split_server, questions, "guarded-online", whole)
    train(split_server, questions, "guarded-online", parts, "--save-every", 2)
    again = train(split_server, questions, "guarded-online", parts, "--resume")
    assert "Resumed after step 6" in again.stdout
    adapter = "adapter_model.safetensors"
    assert (whole / adapter).read_bytes() == (parts / adapter).read_bytes()
    refused = train(split_server, questions, "guarded-online", parts, check=False)
    assert refused.exit_code == 1
    assert "holds a checkpoint" in refused.stderr


def test_costs_are_those_of_all_processes(split_server, questions, tmp_path, monkeypatch):
    def costs(output: Path, *options: object, check: bool = True) -> dict[str, Any]:
        results = tmp_path / "results.json"
        train(split_server, questions, "guarded-online", output, "--json", results, *options, check=check)
        return json.loads(results.read_text()) if check else {}

    whole = costs(tmp_path / "whole")
    step = GuardedTrainer._step

    def interrupted(trainer: GuardedTrainer) -> Any:
        if trainer.done == 4:
            raise KeyboardInterrupt
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(GuardedTrainer, "_step", interrupted)
        patch.setattr("blindtune.cli.progress.peak_memory", lambda: 2**50)
        costs(tmp_path / "parts", "--save-every", 2, check=False)
    parts = costs(tmp_path / "parts", "--resume")
    assert parts["traffic"] == whole["traffic"]
    assert parts["client_flops"] == whole["client_flops"]
    assert parts["bytes_sent"] > whole["bytes_sent"]
    assert parts["bytes_received"] > whole["bytes_received"] + 10_000  # the ends were fetched twice
    assert parts["seconds"] > 0
    assert parts["peak_memory_bytes"] == 2**50
    again = costs(tmp_path / "parts", "--resume")  # no step is left
    assert (again["traffic"], again["client_flops"]) == (whole["traffic"], whole["client_flops"])
    assert again["seconds"] == parts["seconds"]


@pytest.mark.parametrize("method", ["guarded-offline", "offsite"])
def test_offline_sends_nothing_of_the_texts(emulated, questions, tmp_path, method):
    server, seen, key = emulated
    results = tmp_path / "results.json"
    done = train(server, questions, method, tmp_path / "out", "--provider-key", key, "--json", results)
    assert "sees nothing of the texts" in done.stdout
    assert not Transcript(seen).events
    numbers = json.loads(results.read_text())
    assert numbers["bytes_sent"] < 5000  # requests for the parts
    assert not numbers["traffic"]
    summary = json.loads((tmp_path / "out" / "blindtune.json").read_text())
    assert summary["emulator"]["public_key"] == key


def test_adapters_of_the_emulator_go_into_the_trunks_blocks(emulated, tiny_causal, questions, tmp_path):
    server, seen, _ = emulated
    out, results = tmp_path / "out", tmp_path / "results.json"
    options = ["--set", "tune_emulator=true", "--lr", 0.01, "--validation", questions]
    done = train(server, questions, "guarded-offline", out, *options, "--json", results)
    assert "trains" in done.stdout
    assert "of the bottom, emulator and top of" in " ".join(done.stdout.split())
    assert not Transcript(seen).events
    kept = json.loads((out / "blindtune.json").read_text())["emulator"]["blocks"]
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_causal["llama"]), out)
    changed = [n for n, p in stock.named_parameters() if "lora_B" in n and p.abs().sum() > 0]
    assert {int(name.split(".layers.")[1][0]) for name in changed} == {0, *kept, 4}

    reported = json.loads(results.read_text())["validation"]["loss"]
    run("membership", out, "--server", server.url, "--members", questions, "--others", questions, "--json", results)
    assert json.loads(results.read_text())["gap"] == pytest.approx(0)  # of one file; around the emulator with adapters
    run("plug-in", out, "--server", server.url, "--data", questions, "--json", results)
    plugged = json.loads(results.read_text())
    assert len({reported, plugged["plug_in"]["loss"], plugged["zero_shot"]["loss"]}) == 3
    operator = Operator(Transport(server.url), None)
    row = operator.tokenizer().rows(["this film is"], max_length=24)[0].ids
    found, _ = RemotePlugin(operator, *read_tuned(out)).score([row], [1])
    operator.transport.close()
    chances = stock.eval()(torch.tensor([row])).logits[0].log_softmax(-1)
    expected = sum(float(chances[place - 1, row[place]]) for place in range(1, len(row)))
    assert float(found) == pytest.approx(expected, abs=1e-3)


def test_adapters_of_an_emulator_that_have_no_place(emulated, questions, tmp_path):
    server, _, _ = emulated
    tuned = ["--set", "tune_emulator=true"]
    whole = train(server, questions, "guarded-offline", tmp_path / "none", *tuned, "--tune", "full", check=False)
    assert (whole.exit_code, "Use --tune lora" in " ".join(whole.stderr.split())) == (1, True)
    train(server, questions, "guarded-offline", tmp_path / "ends", "--tune", "full", "--validation-fraction", 0)
    start = ["--start", tmp_path / "ends"]
    onto = train(server, questions, "guarded-offline", tmp_path / "none", *tuned, *start, check=False)
    assert (onto.exit_code, "Start from a LoRA checkpoint" in " ".join(onto.stderr.split())) == (1, True)
    assert not (tmp_path / "none").exists()

    out = tmp_path / "out"
    train(server, questions, "guarded-offline", out, *tuned, "--validation-fraction", 0)
    start = ["--start", out, "--validation-fraction", 0]
    train(server, questions, "guarded-offline", tmp_path / "longer", *tuned, *start)  # of the same blocks
    kept = {int(name.split(".layers.")[1][0]) for name in read_tuned(tmp_path / "longer")[0]}
    assert kept == {0, *json.loads((out / "blindtune.json").read_text())["emulator"]["blocks"], 4}
    whole = train(server, questions, "guarded-offline", tmp_path / "none", *start, "--tune", "full", check=False)
    assert (whole.exit_code, "Start from a LoRA checkpoint" in " ".join(whole.stderr.split())) == (1, True)
    assert not (tmp_path / "none").exists()
    without = train(server, questions, "guarded-online", tmp_path / "none", *start, check=False)
    assert (without.exit_code, "doesn't fit" in " ".join(without.stderr.split())) == (1, True)  # the trunk isn't here


def test_an_emulator_that_somebody_else_signed(emulated, questions, tmp_path):
    server, _, _ = emulated
    done = train(server, questions, "offsite", tmp_path / "out", "--provider-key", "0" * 64, check=False)
    assert done.exit_code == 1
    assert "key" in done.stderr
    assert not (tmp_path / "out").exists()


def test_tuned_ends_of_one_run_start_another(split_server, questions, tmp_path):
    """Such as a bottom that was decorrelated on public texts, and then stays frozen."""
    first = tmp_path / "first"
    train(split_server, questions, "guarded-online", first, "--set", "decorrelation_weight=0.5", "--tune", "full")
    done = train(split_server, questions, "guarded-gradfree", tmp_path / "second", "--start", first)
    assert "Starts from the tuned ends" in done.stdout
    tensors, _ = read_tuned(tmp_path / "second")
    assert {name.split(".layers.")[1][0] for name in tensors} == {"0", "1", "3", "4"}  # the start's bottom, too
    assert not (tmp_path / "second" / "adapter_model.safetensors").exists()


def test_a_start_that_is_forgotten_when_a_run_goes_on(split_server, questions, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    train(split_server, questions, "guarded-online", first)
    train(split_server, questions, "guarded-online", second, "--start", first)
    train(split_server, questions, "guarded-online", second, "--start", first, "--resume")
    refused = train(split_server, questions, "guarded-online", second, "--resume", check=False)
    assert refused.exit_code == 1
    assert "differs in: --start" in refused.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--task", "poetry"], "There is no task 'poetry'"),
        (["--set", "up=int2"], "no codec 'int2'"),
        (["--template", "{nothing}"], "names 'nothing'"),
        (["--cache-mb", "0"], "MiB are allowed"),
        (["--start", "nowhere"], "holds no adapter_config.json"),
        (["--target-modules", "query"], "No layer is called"),
    ],
)
def test_mistakes_in_one_sentence(split_server, questions, tmp_path, options, says):
    done = train(split_server, questions, "guarded-gradfree", tmp_path / "out", *options, check=False)
    assert done.exit_code == 1
    assert says in done.stderr.replace("\n", " ")


def test_a_server_without_ends_to_give(tiny_server, questions, tmp_path):
    done = train(tiny_server, questions, "guarded-online", tmp_path / "out", "--model", "llama", check=False)
    assert done.exit_code == 1
    assert "--split" in done.stderr


def test_a_bottom_that_was_decorrelated_on_public_text(split_server, questions, film_sentences, tmp_path):
    public = tmp_path / "public.txt.jsonl"
    lines = [s for s in film_sentences[60:] if 4 <= len(s.split()) <= 12][:40]
    public.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    first, out, results = tmp_path / "decorrelated", tmp_path / "out", tmp_path / "results.json"
    text = ["--task", "text", "--set", "decorrelation_weight=5", "--validation", public, "--json", results]
    train(split_server, public, "guarded-online", first, *text)
    assert set(json.loads(results.read_text())["validation"]) == {"loss"}  # nothing to choose between
    done = train(split_server, questions, "guarded-gradfree", out, "--start", first)
    assert "Starts from the tuned ends" in done.stdout
    told = json.loads((out / "blindtune.json").read_text())
    assert told["start"]["options"]["decorrelation_weight"] == 5
    recipe = Recipe.of(told)
    assert [stage.method for stage in recipe.stages()] == ["guarded-online", "guarded-gradfree"]
    assert recipe.changes_bottom
    assert not Recipe.of({**told, "start": None}).changes_bottom
    (first / "blindtune.json").unlink()  # as PEFT itself would have written it
    train(split_server, questions, "guarded-gradfree", tmp_path / "foreign", "--start", first)
    assert json.loads((tmp_path / "foreign" / "blindtune.json").read_text())["start"] == {}
