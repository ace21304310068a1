"""`blindtune texts train` as a user runs it."""

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

from blindtune.client import DeployedModel, Operator, Transport
from blindtune.errors import ConfigError
from blindtune.texts import Trainer, read_tuned_parts
from blindtune.texts.costs import peak_memory, reset_peak_memory
from blindtune.texts.shadow import ShadowClient
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


def train(server: Any, questions: Path, design: str, output: Path, *options: object, check: bool = True) -> Result:
    arguments = ["--server", server.url, "--data", questions, "--design", design, "--output", output]
    return run("texts", "train", *arguments, *SMALL, *options, check=check)


def test_gradfree_from_a_file_to_a_peft_checkpoint(cut_server, questions, tmp_path):
    out, results, ground_truth = tmp_path / "out", tmp_path / "results.json", tmp_path / "ground-truth.jsonl"
    assert b"x" * BLOCK  # as loading may need it: no cost of training
    loading = peak_memory()
    done = train(cut_server, questions, "gradfree", out, "--json", results, "--ground-truth", ground_truth)
    assert "sees every token's hidden state (int8 up, int8 down), once for each text, and no gradient" in done.stdout
    numbers = json.loads(results.read_text())
    assert set(numbers["traffic"]) == {"s_A up", "s_B down"}
    assert 0 <= numbers["validation"]["accuracy"] <= 1
    assert numbers["client_flops"] > 0
    assert numbers["peak_memory_bytes"] > 10**8  # torch alone needs more
    assert numbers["peak_memory_bytes"] < loading - BLOCK / 2 or not reset_peak_memory()
    told = [json.loads(line) for line in ground_truth.read_text().splitlines()]
    assert len({entry["forward"] for entry in told}) == len(told)
    assert [entry["part"] for entry in told] == ["train"] * 6 + ["validation"] * (len(told) - 6)
    assert len(told) > 6  # what was held out is sent to be scored
    assert stat.S_IMODE(ground_truth.stat().st_mode) == 0o600
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(cut_server.model), out)
    changed = [n for n, p in stock.named_parameters() if "lora_B" in n and p.abs().sum() > 0]
    assert {name.split(".layers.")[1][0] for name in changed} == {"3", "4"}  # the top's blocks


def test_classes_are_words_that_follow(cut_server, film_examples, tmp_path):
    rows = [{"text": t, "label": int(y)} for t, y in zip(film_examples.texts, film_examples.labels, strict=True)]
    data, out, results = tmp_path / "reviews.jsonl", tmp_path / "out", tmp_path / "results.json"
    data.write_text("\n".join([json.dumps(row) for row in rows if 4 <= len(row["text"].split()) <= 12][:40]))
    task = ["--task", "classification", "--question", "classes=bad,good"]
    train(cut_server, data, "gradfree", out, *task, "--validation", data, "--json", results)
    scores = json.loads(results.read_text())["validation"]
    assert 0 <= scores["accuracy"] <= 1
    assert scores["loss"] > 0
    fields = json.loads((out / "blindtune.json").read_text())["fields"]
    assert (fields["kind"], fields["label"], fields["classes"]) == ("classification", "label", ["bad", "good"])
    done = run("texts", "deploy", out, "--server", cut_server.url, "--data", data, "--json", results)
    assert "deployed accuracy" in done.stdout
    assert json.loads(results.read_text())["deployed"]["loss"] == pytest.approx(scores["loss"], abs=0.02)  # int8


def test_other_files_get_the_classes_of_the_training_data(cut_server, film_examples, tmp_path):
    """A validation file or a test file may lack a class. Without names, its own labels would be another task."""
    rows = [{"text": t, "label": int(y)} for t, y in zip(film_examples.texts, film_examples.labels, strict=True)]
    rows = [row for row in rows if 4 <= len(row["text"].split()) <= 12][:40]
    files = {"train": rows, "positive": [row for row in rows if row["label"] == 1][:6]}
    for name, chosen in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    out, results, positive = tmp_path / "out", tmp_path / "results.json", tmp_path / "positive.jsonl"
    task = ["--task", "classification", "--validation", positive]
    train(cut_server, tmp_path / "train.jsonl", "gradfree", out, *task, "--json", results)
    assert 0 <= json.loads(results.read_text())["validation"]["accuracy"] <= 1
    assert json.loads((out / "blindtune.json").read_text())["fields"]["classes"] == ["0", "1"]
    run("texts", "deploy", out, "--server", cut_server.url, "--data", positive)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--validation", "1.5"], "fraction of 1.5 can't work"),
        (["--validation", "-0.1"], "fraction of -0.1 can't work"),
        (["--validation", "0.999"], "All 40 examples would be held out"),
        (["--training", "epochs=0"], "epochs = 0 can't work"),
        (["--question", "classes=a,b"], "classes=… has no effect with the task 'choice'"),
        (["--question", "label=x"], "label=… has no effect with the task 'choice'"),
        (["--question", "template={nothing}"], "--question template=…"),
    ],
)
def test_options_that_can_not_work_are_refused(cut_server, questions, tmp_path, options, message):
    refused = train(cut_server, questions, "online", tmp_path / "out", *options, check=False)
    assert refused.exit_code == 1
    assert message in refused.stderr


def test_noise_is_announced_with_its_guarantee(cut_server, questions, tmp_path):
    noisy = ["--set", "noise=0.5", "--set", "clip_norm=2.0", "--validation", 0]
    done = train(cut_server, questions, "gradfree", tmp_path / "once", *noisy)
    assert "noise of 0.5 clipping norms on each value (μ = 4.00 for one row of a text, after 1 messages)" in done.stdout
    done = train(cut_server, questions, "online", tmp_path / "each", *noisy, "--steps", 40)  # of 4, 40 texts
    assert "(μ = 8.00 for one row of a text, after 4 messages)" in done.stdout
    two_points = ["--set", "zo=true", "--steps", 40]
    done = train(cut_server, questions, "gradfree", tmp_path / "zo", *noisy, *two_points)
    assert "(μ = 11.31 for one row of a text, after 8 messages)" in done.stdout


def test_a_run_that_goes_on(cut_server, questions, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(cut_server, questions, "online", whole)
    train(cut_server, questions, "online", parts, "--training", "save_every=2")
    again = train(cut_server, questions, "online", parts, "--resume")
    assert "Resumed after step 6" in again.stdout
    adapter = "adapter_model.safetensors"
    assert (whole / adapter).read_bytes() == (parts / adapter).read_bytes()
    refused = train(cut_server, questions, "online", parts, check=False)
    assert refused.exit_code == 1
    assert "holds a checkpoint" in refused.stderr


def test_costs_are_those_of_all_processes(cut_server, questions, tmp_path, monkeypatch):
    def costs(output: Path, *options: object, check: bool = True) -> dict[str, Any]:
        results = tmp_path / "results.json"
        train(cut_server, questions, "online", output, "--json", results, *options, check=check)
        return json.loads(results.read_text()) if check else {}

    whole = costs(tmp_path / "whole")
    step = Trainer._step

    def interrupted(trainer: Trainer) -> Any:
        if trainer.done == 4:
            raise KeyboardInterrupt
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        patch.setattr("blindtune.texts.session.peak_memory", lambda: 2**50)
        costs(tmp_path / "parts", "--training", "save_every=2", check=False)
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


@pytest.mark.parametrize("design", ["offline", "offsite"])
def test_offline_sends_nothing_of_the_texts(emulated, questions, tmp_path, design):
    server, seen, key = emulated
    results = tmp_path / "results.json"
    done = train(server, questions, design, tmp_path / "out", "--provider-key", key, "--json", results)
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
    done = train(server, questions, "offline", out, *options, "--json", results)
    assert "trains" in done.stdout
    assert "of the bottom, emulator and top of" in " ".join(done.stdout.split())
    assert not Transcript(seen).events
    kept = json.loads((out / "blindtune.json").read_text())["emulator"]["blocks"]
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_causal["llama"]), out)
    changed = [n for n, p in stock.named_parameters() if "lora_B" in n and p.abs().sum() > 0]
    assert {int(name.split(".layers.")[1][0]) for name in changed} == {0, *kept, 4}

    reported = json.loads(results.read_text())["validation"]["loss"]
    both = ["--members", questions, "--others", questions]
    run("texts", "membership", out, "--server", server.url, *both, "--json", results)
    assert json.loads(results.read_text())["gap"] == pytest.approx(0)  # of one file; around the emulator with adapters
    run("texts", "deploy", out, "--server", server.url, "--data", questions, "--json", results)
    deployed = json.loads(results.read_text())
    assert len({reported, deployed["deployed"]["loss"], deployed["zero_shot"]["loss"]}) == 3
    operator = Operator(Transport(server.url), None)
    row = operator.tokenizer().rows(["this film is"], max_length=24)[0].ids
    found, _ = DeployedModel(operator, *read_tuned_parts(out)).score([row], [1])
    operator.transport.close()
    chances = stock.eval()(torch.tensor([row])).logits[0].log_softmax(-1)
    expected = sum(float(chances[place - 1, row[place]]) for place in range(1, len(row)))
    assert float(found) == pytest.approx(expected, abs=1e-3)


def test_adapters_of_an_emulator_that_have_no_place(emulated, questions, tmp_path):
    server, _, _ = emulated
    tuned = ["--set", "tune_emulator=true"]
    whole = train(server, questions, "offline", tmp_path / "none", *tuned, "--tune", "full", check=False)
    assert (whole.exit_code, "Use --tune lora" in " ".join(whole.stderr.split())) == (1, True)
    train(server, questions, "offline", tmp_path / "ends", "--tune", "full", "--validation", 0)
    start = ["--start", tmp_path / "ends"]
    onto = train(server, questions, "offline", tmp_path / "none", *tuned, *start, check=False)
    assert (onto.exit_code, "Start from a LoRA checkpoint" in " ".join(onto.stderr.split())) == (1, True)
    assert not (tmp_path / "none").exists()

    out = tmp_path / "out"
    train(server, questions, "offline", out, *tuned, "--validation", 0)
    start = ["--start", out, "--validation", 0]
    train(server, questions, "offline", tmp_path / "longer", *tuned, *start)  # of the same blocks
    kept = {int(name.split(".layers.")[1][0]) for name in read_tuned_parts(tmp_path / "longer")[0]}
    assert kept == {0, *json.loads((out / "blindtune.json").read_text())["emulator"]["blocks"], 4}
    whole = train(server, questions, "offline", tmp_path / "none", *start, "--tune", "full", check=False)
    assert (whole.exit_code, "Start from a LoRA checkpoint" in " ".join(whole.stderr.split())) == (1, True)
    assert not (tmp_path / "none").exists()
    without = train(server, questions, "online", tmp_path / "none", *start, check=False)
    assert (without.exit_code, "doesn't fit" in " ".join(without.stderr.split())) == (1, True)  # the trunk isn't here


def test_an_emulator_that_somebody_else_signed(emulated, questions, tmp_path):
    server, _, _ = emulated
    done = train(server, questions, "offsite", tmp_path / "out", "--provider-key", "0" * 64, check=False)
    assert done.exit_code == 1
    assert "key" in done.stderr
    assert not (tmp_path / "out").exists()


def test_tuned_ends_of_one_run_start_another(cut_server, questions, tmp_path):
    """Such as a bottom that was decorrelated on public texts, and then stays frozen."""
    first = tmp_path / "first"
    train(cut_server, questions, "online", first, "--set", "decorrelation_weight=0.5", "--tune", "full")
    done = train(cut_server, questions, "gradfree", tmp_path / "second", "--start", first)
    assert "Starts from the tuned parts" in done.stdout
    tensors, _ = read_tuned_parts(tmp_path / "second")
    assert {name.split(".layers.")[1][0] for name in tensors} == {"0", "1", "3", "4"}  # the start's bottom, too
    assert not (tmp_path / "second" / "adapter_model.safetensors").exists()


def test_a_start_that_is_forgotten_when_a_run_goes_on(cut_server, questions, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    train(cut_server, questions, "online", first)
    train(cut_server, questions, "online", second, "--start", first)
    train(cut_server, questions, "online", second, "--start", first, "--resume")
    refused = train(cut_server, questions, "online", second, "--resume", check=False)
    assert refused.exit_code == 1
    assert "differs in: --start" in refused.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--task", "poetry"], "There is no task 'poetry'"),
        (["--set", "up=int2"], "no codec 'int2'"),
        (["--question", "template={nothing}"], "names 'nothing'"),
        (["--question", "answers=answer"], "There is no option 'answers'"),
        (["--training", "cache_mb=0"], "cache_mb = 0 is no count"),
        (["--training", "cache_mb=much"], "--training cache_mb=much can't be read"),
        (["--training", "momentum=0.9"], "There is no training option 'momentum'"),
        (["--set", "decorrelation=1"], "gradfree has no option 'decorrelation'"),
        (["--design", "sideways"], "There is no design 'sideways'"),
        (["--start", "nowhere"], "holds no adapter_config.json"),
        (["--tune", "target_modules=query"], "No layer is called"),
        (["--tune", "half"], "--tune half is unknown"),
        (["--tune", "depth=3"], "There is no option 'depth'"),
        (["--tune", "rank=high"], "rank = 'high' is no count"),
        (["--tune", "alpha=-1"], "alpha = -1 is no count"),
    ],
)
def test_mistakes_in_one_sentence(cut_server, questions, tmp_path, options, says):
    done = train(cut_server, questions, "gradfree", tmp_path / "out", *options, check=False)
    assert done.exit_code == 1
    assert says in done.stderr.replace("\n", " ")


def test_a_server_without_ends_to_give(tiny_server, questions, tmp_path):
    done = train(tiny_server, questions, "online", tmp_path / "out", "--model", "llama", check=False)
    assert done.exit_code == 1
    assert "--cut" in done.stderr


def test_a_bottom_that_was_decorrelated_on_public_text(cut_server, questions, film_sentences, tmp_path):
    public = tmp_path / "public.txt.jsonl"
    lines = [s for s in film_sentences[60:] if 4 <= len(s.split()) <= 12][:40]
    public.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    first, out, results = tmp_path / "decorrelated", tmp_path / "out", tmp_path / "results.json"
    text = ["--task", "text", "--set", "decorrelation_weight=5", "--validation", public, "--json", results]
    train(cut_server, public, "online", first, *text)
    assert set(json.loads(results.read_text())["validation"]) == {"loss"}  # nothing to choose between
    done = train(cut_server, questions, "gradfree", out, "--start", first)
    assert "Starts from the tuned parts" in done.stdout
    told = json.loads((out / "blindtune.json").read_text())
    assert told["start"]["options"]["decorrelation_weight"] == 5
    shadow = ShadowClient(out)
    assert [stage.method for stage in shadow.stages] == ["online", "gradfree"]
    assert shadow.changes_bottom
    assert not ShadowClient(shadow.stages[-1].model_copy(update={"start": None})).changes_bottom
    (first / "blindtune.json").unlink()  # as PEFT itself would have written it
    train(cut_server, questions, "gradfree", tmp_path / "foreign", "--start", first)
    foreign = json.loads((tmp_path / "foreign" / "blindtune.json").read_text())
    assert (foreign["start"], foreign["unknown_start"]) == (None, True)
    with pytest.raises(ConfigError, match="started from a checkpoint"):
        ShadowClient(tmp_path / "foreign")
