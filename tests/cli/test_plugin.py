"""`blindtune plug-in` as a user runs it, against real servers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from blindtune.client import Operator, RemotePlugin, Transport
from blindtune.errors import InvalidTensor, SequenceTooLong, UnknownPart, UnknownPlugin
from blindtune.methods.guarded import read_tuned
from blindtune.server import add_token
from blindtune.wire import ScoreRequest, Transcript, encode
from tests.cli.commands import run
from tests.conftest import SplitServer

PROMPTS = ["the film is", "a story of love and", "one of the"]


@pytest.fixture(scope="module")
def questions(film_sentences, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    short = [sentence for sentence in film_sentences if 4 <= len(sentence.split()) <= 12][:24]
    rows = [{"question": s, "choices": ["good", "bad", "fine"], "answer": i % 3} for i, s in enumerate(short)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def checkpoint(split_server: SplitServer, questions, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run") / "out"
    run("train", "--server", split_server.url, "--data", questions, "--method", "guarded-online", "--output", output,
        "--steps", 12, "--batch-size", 4, "--max-length", 24, "--lr", 0.01, "--validation-fraction", 0)  # fmt: skip
    return output


@pytest.fixture
def operator(split_server: SplitServer):
    transport = Transport(split_server.url)
    yield Operator(transport, None)
    transport.close()


@pytest.fixture(scope="module")
def stock(split_server: SplitServer, checkpoint):
    """The tuned model as stock tools load it, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(split_server.model)
    return PeftModel.from_pretrained(model, checkpoint).eval(), AutoTokenizer.from_pretrained(split_server.model)


def test_scores_are_those_of_stock_peft(operator, checkpoint, stock):
    model, tokenizer = stock
    rows = [tokenizer(text)["input_ids"] for text in PROMPTS]
    plugin = RemotePlugin(operator, *read_tuned(checkpoint))
    found, _ = plugin.score(rows, [1, 2, 1])
    for row, start, value in zip(rows, [1, 2, 1], found.tolist(), strict=True):
        chances = model(torch.tensor([row])).logits[0].log_softmax(-1)
        expected = sum(float(chances[place - 1, row[place]]) for place in range(start, len(row)))
        assert value == pytest.approx(expected, abs=1e-3)
    assert (RemotePlugin(operator).score(rows, [1, 2, 1])[0] - found).abs().max() > 0.05  # not the model as it is


def test_generated_text_is_that_of_stock_peft(operator, checkpoint, stock):
    model, tokenizer = stock
    plugin = RemotePlugin(operator, *read_tuned(checkpoint))
    for text in PROMPTS:
        row = tokenizer(text)["input_ids"]
        written = model.generate(torch.tensor([row]), max_new_tokens=8, do_sample=False)[0, len(row) :].tolist()
        ended = model.config.eos_token_id
        assert plugin.generate(row, max_new_tokens=8) == [token for token in written if token != ended]
    one, same, other = (plugin.generate(row, max_new_tokens=8, temperature=3.0, seed=seed) for seed in (1, 1, 2))
    assert one == same != other


def _score_body(plugin: str) -> bytes:
    tensors = {"input_ids": [[5, 6]], "lengths": [2], "starts": [1]}
    return encode(ScoreRequest(plugin=plugin), {k: torch.tensor(v, dtype=torch.int32) for k, v in tensors.items()})


def test_a_server_with_little_room(start_server, split_server, checkpoint, tmp_path):
    """Ends belong to their tenant; those that were forgotten travel again; and all of it is recorded."""
    alice, bob = (add_token(tmp_path / "tokens", name) for name in ("alice", "bob"))
    tensors, scaling = read_tuned(checkpoint)
    options = {"split": 2, "token_file": tmp_path / "tokens", "plugin_mb": 1, "record": tmp_path / "seen"}
    with start_server(split_server.model, **options) as server:
        mine, theirs = (Operator(Transport(server.url, token), None) for token in (alice, bob))
        plugin = RemotePlugin(mine, tensors, scaling)
        assert plugin.sha256 is not None
        before, _ = plugin.score([[5, 6, 7]], [1])
        with pytest.raises(UnknownPlugin):
            theirs.transport.post(f"{theirs.path}/score", _score_body(plugin.sha256))
        for factor in range(2, 40):  # each merged into blocks of its own, until the first has no room
            RemotePlugin(mine, {name: factor * tensor for name, tensor in tensors.items()}, scaling)
        with pytest.raises(UnknownPlugin):
            mine.transport.post(f"{mine.path}/score", _score_body(plugin.sha256))
        assert torch.equal(plugin.score([[5, 6, 7]], [1])[0], before)
        plugin.generate([5, 6], max_new_tokens=2)
        for operator in (mine, theirs):
            operator.transport.close()
    events = Transcript(tmp_path / "seen").events
    assert {"plugin", "score", "generate"} == {event.kind for event in events}
    assert {event.tenant for event in events} == {"alice"}


def test_from_a_checkpoint_to_a_table(split_server, checkpoint, questions, tmp_path):
    results = tmp_path / "results.json"
    done = run("plug-in", checkpoint, "--server", split_server.url, "--data", questions, "--prompt", PROMPTS[0],
               "--max-new-tokens", 4, "--json", results)  # fmt: skip
    numbers = json.loads(results.read_text())
    assert numbers["plug_in"]["loss"] < numbers["zero_shot"]["loss"]  # these are the training questions
    assert "plug in loss" in done.stdout.replace("-", " ")
    assert PROMPTS[0] in done.stdout


def test_mistakes_in_one_sentence(split_server, tiny_server, checkpoint, questions, tmp_path):
    done = run("plug-in", tmp_path, "--server", split_server.url, check=False)
    assert (done.exit_code, "holds no adapter_config.json" in done.stderr) == (1, True)
    done = run("plug-in", checkpoint, "--server", tiny_server.url, "--model", "llama", check=False)
    assert (done.exit_code, "--split" in done.stderr) == (1, True)
    done = run(
        "plug-in", checkpoint, "--server", split_server.url, "--data", questions, "--task", "poetry", check=False
    )
    assert (done.exit_code, "no task 'poetry'" in done.stderr) == (1, True)


def test_ends_of_another_model_and_texts_that_cannot_be_scored(operator, checkpoint):
    tensors, scaling = read_tuned(checkpoint)
    operator.info = operator.info.model_copy(update={"fingerprint": "0" * 64})
    with pytest.raises(UnknownPart, match="tuned for other weights"):
        RemotePlugin(operator, tensors, scaling)
    plain = RemotePlugin(operator)
    with pytest.raises(InvalidTensor, match="start"):
        plain.score([[5, 6, 7]], [3])
    with pytest.raises(InvalidTensor, match="start"):
        plain.score([[5, 6, 7]], [0])
    with pytest.raises(SequenceTooLong):
        plain.generate([5] * 30, max_new_tokens=1024)
