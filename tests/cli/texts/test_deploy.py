"""`blindtune texts deploy` as a user runs it, against real servers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from blindtune.client import DeployedModel, Operator, Transport
from blindtune.errors import InvalidTensor, SequenceTooLong, UnknownPart, UnknownTunedParts
from blindtune.server import add_token
from blindtune.texts import read_tuned_parts
from blindtune.training import LabelsSummary
from blindtune.training.summary import write_summary
from blindtune.wire import Readout, ScoreRequest, Transcript, encode
from tests.cli.commands import run
from tests.conftest import CutServer

PROMPTS = ["the film is", "a story of love and", "one of the"]


@pytest.fixture(scope="module")
def questions(film_sentences, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    short = [sentence for sentence in film_sentences if 4 <= len(sentence.split()) <= 12][:24]
    rows = [{"question": s, "choices": ["good", "bad", "fine"], "answer": i % 3} for i, s in enumerate(short)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def checkpoint(cut_server: CutServer, questions, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run") / "out"
    run("texts", "train", "--server", cut_server.url, "--data", questions, "--design", "online", "--output", output,
        "--steps", 12, "--batch-size", 4, "--max-length", 24, "--lr", 0.01, "--validation", 0)  # fmt: skip
    return output


@pytest.fixture
def operator(cut_server: CutServer):
    transport = Transport(cut_server.url)
    yield Operator(transport, None)
    transport.close()


@pytest.fixture(scope="module")
def stock(cut_server: CutServer, checkpoint):
    """The tuned model as stock tools load it, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(cut_server.model)
    return PeftModel.from_pretrained(model, checkpoint).eval(), AutoTokenizer.from_pretrained(cut_server.model)


def test_scores_are_those_of_stock_peft(operator, checkpoint, stock):
    model, tokenizer = stock
    rows = [tokenizer(text)["input_ids"] for text in PROMPTS]
    deployed = DeployedModel(operator, *read_tuned_parts(checkpoint))
    found, _ = deployed.score(rows, [1, 2, 1])
    for row, start, value in zip(rows, [1, 2, 1], found.tolist(), strict=True):
        chances = model(torch.tensor([row])).logits[0].log_softmax(-1)
        expected = sum(float(chances[place - 1, row[place]]) for place in range(start, len(row)))
        assert value == pytest.approx(expected, abs=1e-3)
    assert (DeployedModel(operator).score(rows, [1, 2, 1])[0] - found).abs().max() > 0.05  # not the model as it is


def test_generated_text_is_that_of_stock_peft(operator, checkpoint, stock):
    model, tokenizer = stock
    deployed = DeployedModel(operator, *read_tuned_parts(checkpoint))
    for text in PROMPTS:
        row = tokenizer(text)["input_ids"]
        written = model.generate(torch.tensor([row]), max_new_tokens=8, do_sample=False)[0, len(row) :].tolist()
        ended = model.config.eos_token_id
        assert deployed.generate(row, max_new_tokens=8) == [token for token in written if token != ended]
    one, same, other = (deployed.generate(row, max_new_tokens=8, temperature=3.0, seed=seed) for seed in (1, 1, 2))
    assert one == same != other


def _score_body(tuned_parts: str) -> bytes:
    tensors = {"input_ids": [[5, 6]], "lengths": [2], "starts": [1]}
    return encode(
        ScoreRequest(tuned_parts=tuned_parts), {k: torch.tensor(v, dtype=torch.int32) for k, v in tensors.items()}
    )


def test_a_server_with_little_room(start_server, cut_server, checkpoint, tmp_path):
    """Ends belong to their tenant; those that were forgotten travel again; and all of it is recorded."""
    alice, bob = (add_token(tmp_path / "tokens", name) for name in ("alice", "bob"))
    tensors, scaling = read_tuned_parts(checkpoint)
    options = {"cut": 2, "token_file": tmp_path / "tokens", "tuned_parts_mb": 1, "record": tmp_path / "seen"}
    with start_server(cut_server.model, **options) as server:
        mine, theirs = (Operator(Transport(server.url, token=token), None) for token in (alice, bob))
        deployed = DeployedModel(mine, tensors, scaling)
        assert deployed.sha256 is not None
        before, _ = deployed.score([[5, 6, 7]], [1])
        with pytest.raises(UnknownTunedParts):
            theirs.transport.post(f"{theirs.path}/score", _score_body(deployed.sha256))
        for factor in range(2, 40):  # each merged into blocks of its own, until the first has no room
            DeployedModel(mine, {name: factor * tensor for name, tensor in tensors.items()}, scaling)
        with pytest.raises(UnknownTunedParts):
            mine.transport.post(f"{mine.path}/score", _score_body(deployed.sha256))
        assert torch.equal(deployed.score([[5, 6, 7]], [1])[0], before)
        deployed.generate([5, 6], max_new_tokens=2)
        for operator in (mine, theirs):
            operator.transport.close()
    events = Transcript(tmp_path / "seen").events
    assert {"plugin", "score", "generate"} == {event.kind for event in events}
    assert {event.tenant for event in events} == {"alice"}


def test_from_a_checkpoint_to_a_table(cut_server, checkpoint, questions, tmp_path):
    results = tmp_path / "results.json"
    done = run("texts", "deploy", checkpoint, "--server", cut_server.url, "--data", questions, "--prompt", PROMPTS[0],
               "--max-new-tokens", 4, "--json", results)  # fmt: skip
    numbers = json.loads(results.read_text())
    assert numbers["deployed"]["loss"] < numbers["zero_shot"]["loss"]  # these are the training questions
    assert "deployed loss" in done.stdout
    assert PROMPTS[0] in done.stdout


def test_mistakes_in_one_sentence(cut_server, tiny_server, checkpoint, questions, tmp_path):
    done = run("texts", "deploy", tmp_path, "--server", cut_server.url, check=False)
    assert (done.exit_code, "holds no adapter_config.json" in done.stderr) == (1, True)
    done = run("texts", "deploy", checkpoint, "--server", tiny_server.url, "--model", "llama", check=False)
    assert (done.exit_code, "--cut" in done.stderr) == (1, True)
    scored = ["--server", cut_server.url, "--data", questions]
    done = run("texts", "deploy", checkpoint, *scored, "--task", "poetry", check=False)
    assert (done.exit_code, "no task 'poetry'" in done.stderr) == (1, True)


@pytest.mark.parametrize("adapters", [1, 3])
def test_a_run_with_private_labels_is_not_deployed(cut_server, checkpoint, questions, tmp_path, adapters):
    """Its adapters may be as secret as its labels, so none of them is uploaded; neither do texts start from it."""
    summary = LabelsSummary(
        method="padded-lora", options={}, model="llama", base_model_name="llama", fingerprint="1" * 64, max_length=24,
        run="", hidden_size=32,
        readout=Readout(pooling="last"), pairs="joint", codec="fp32", adapters=adapters, seed=0, head="LinearHead",
        loss="cross_entropy", num_classes=2, classes=["bad", "good"],
    )  # fmt: skip
    write_summary(tmp_path, summary)
    if adapters == 1:  # several are in folders of their own
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    before = cut_server.server.answered()
    members = ["--members", questions, "--others", questions]
    train = ["--data", questions, "--output", tmp_path / "out", "--design", "online"]
    for command in (["deploy", tmp_path], ["membership", tmp_path, *members], ["train", *train, "--start", tmp_path]):
        done = run("texts", *command, "--server", cut_server.url, check=False)
        told = " ".join(done.stderr.split())
        assert done.exit_code == 1
        assert "holds a run of private labels, not of private texts" in told
        assert "Use the commands of `blindtune labels` for it" in told
    after = cut_server.server.answered()
    assert {route for route in after if after[route] != before[route]} <= {
        "{model}",
        "models",
        "tokenizer",
        "{part}",
        "metrics",
    }
    assert not (tmp_path / "out").exists()


def test_ends_of_another_model_and_texts_that_cannot_be_scored(operator, checkpoint):
    tensors, scaling = read_tuned_parts(checkpoint)
    operator.info = operator.info.model_copy(update={"fingerprint": "0" * 64})
    with pytest.raises(UnknownPart, match="tuned for other weights"):
        DeployedModel(operator, tensors, scaling)
    plain = DeployedModel(operator)
    with pytest.raises(InvalidTensor, match="start"):
        plain.score([[5, 6, 7]], [3])
    with pytest.raises(InvalidTensor, match="start"):
        plain.score([[5, 6, 7]], [0])
    with pytest.raises(SequenceTooLong):
        plain.generate([5] * 30, max_new_tokens=1024)
