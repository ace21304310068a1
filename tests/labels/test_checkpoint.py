"""Checkpoints: what is saved is what was trained, in PEFT's format, and secrets are for the owner alone."""

import json
import os
import shutil
import stat

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

from blindtune.client import Backbone
from blindtune.errors import CheckpointError, SingleOperator
from blindtune.labels import (
    P3EFT,
    Features,
    LoRA,
    PaddedLoRA,
    PrivateModel,
    TrainConfig,
    Trainer,
    adapter_config,
    make_head,
    squared_error,
)
from blindtune.training import LabelsSummary, read_summary


def trained(backbone, film_examples, method, head="linear"):
    texts, labels = [str(t) for t in film_examples.texts[:16]], film_examples.labels[:16]
    model = PrivateModel(backbone, make_head(head, backbone.hidden_size, 2), method)
    model.prepare(texts, labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(texts, labels).loss.backward()
        optimizer.step()
    return model.eval()


def save_to_go_on(model, film_examples, folder):
    """With what a trainer needs to go on."""
    Trainer(model, film_examples.take(range(16)), TrainConfig(), checkpoint=folder).save()


@pytest.mark.parametrize("method", [LoRA, Features, PaddedLoRA, P3EFT])
def test_a_loaded_model_predicts_the_same(connect, film_examples, tmp_path, method):
    made = PaddedLoRA(steps=20) if method is PaddedLoRA else method()  # few steps, so that rounding is small
    model = trained(connect(), film_examples, made)
    model.save_pretrained(tmp_path, classes=["bad", "good"])
    again = PrivateModel.from_pretrained(tmp_path, connect(adapter=adapter_config(tmp_path)))
    texts = [str(t) for t in film_examples.texts[20:30]]
    with torch.no_grad():
        first, second = model(texts).logits, again(texts).logits
    if method is PaddedLoRA:  # under another pad
        assert torch.allclose(first, second, atol=0.3 * float(first.std()))
    else:
        assert torch.equal(first, second)


def test_a_loaded_model_has_its_loss(connect, film_examples, tmp_path):
    def own(logits, labels):
        return 2.0 * squared_error(logits, labels)

    for loss, name in ((squared_error, "squared"), (torch.nn.functional.cross_entropy, "cross_entropy"), (own, "own")):
        backbone, folder = connect(), tmp_path / name
        model = PrivateModel(backbone, make_head("linear", backbone.hidden_size, 2), LoRA(), loss=loss)
        save_to_go_on(model, film_examples, folder)
        assert read_summary(folder, LabelsSummary).loss == name
        again = PrivateModel.from_pretrained(folder, connect(), loss=loss if name == "own" else None)
        assert again.loss is loss
        other = torch.nn.functional.cross_entropy if name == "squared" else squared_error
        changed = PrivateModel.from_pretrained(folder, connect(), loss=other)
        trainer = Trainer(changed, film_examples.take(range(16)), TrainConfig(), checkpoint=folder)
        with pytest.raises(CheckpointError, match="loss"):
            trainer.resume()


@pytest.mark.parametrize("head", ["mlp", "pooler"])
def test_a_loaded_model_has_its_head_and_the_options_of_its_recipe(connect, film_examples, tmp_path, head):
    model = trained(connect(), film_examples, P3EFT(recipe=2023), head)
    model.save_pretrained(tmp_path)
    again = PrivateModel.from_pretrained(tmp_path, connect(adapter=adapter_config(tmp_path)))
    texts = [str(t) for t in film_examples.texts[20:30]]
    with torch.no_grad():
        assert torch.equal(model(texts).logits, again(texts).logits)
    assert again.method == model.method


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "head.safetensors", "secret.safetensors", "blindtune.json"]
)
def test_files_of_two_runs_make_no_checkpoint(connect, film_examples, tmp_path, name):
    """A save that was broken off, or two that were written at once: what one run learned would count in the other."""
    for folder in ("one", "two"):
        trained(connect(), film_examples, PaddedLoRA()).save_pretrained(tmp_path / folder)
    shutil.copy(tmp_path / "two" / name, tmp_path / "one" / name)
    with pytest.raises(CheckpointError, match=r"files of two runs|of another run"):
        PrivateModel.from_pretrained(tmp_path / "one", connect(adapter=adapter_config(tmp_path / "one")))


def test_what_a_run_before_left_to_go_on_from_goes_away(connect, film_examples, tmp_path):
    first = trained(connect(), film_examples, PaddedLoRA())
    save_to_go_on(first, film_examples, tmp_path)
    first.save_pretrained(tmp_path)
    assert (tmp_path / "resume.safetensors").is_file()
    trained(connect(), film_examples, PaddedLoRA()).save_pretrained(tmp_path)
    assert not (tmp_path / "resume.safetensors").is_file()


def test_adapters_load_into_stock_peft_with_equal_hidden_states(connect, film_examples, tiny_models, tmp_path):
    model = trained(connect(), film_examples, P3EFT())
    model.save_pretrained(tmp_path)
    backbone = model.backbone
    rows = backbone.rows([str(t) for t in film_examples.texts[:4]])
    tokens = backbone.tokenizer.pad(rows)
    mask = (torch.arange(tokens.input_ids.shape[1]) < tokens.lengths.unsqueeze(1)).long()
    with torch.no_grad():
        hidden = backbone.all_adapters(rows)
        for index in range(2):
            stock = PeftModel.from_pretrained(
                AutoModel.from_pretrained(tiny_models["bert"]), tmp_path / f"adapter_{index}"
            )
            states = stock(
                input_ids=tokens.input_ids.long(), attention_mask=mask, token_type_ids=tokens.token_type_ids.long()
            ).last_hidden_state
            assert torch.allclose(states[:, 0], hidden[index], atol=1e-5)  # this BERT pools its first token


def test_secrets_are_readable_by_their_owner_only_and_adapters_hold_none(connect, film_examples, tmp_path):
    model = trained(connect(), film_examples, P3EFT())
    save_to_go_on(model, film_examples, tmp_path)
    for name in ("secret.safetensors", "resume.safetensors", "head.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    mixing = model.method.mixing.numpy().tobytes()
    assert mixing in (tmp_path / "secret.safetensors").read_bytes()
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name not in ("secret.safetensors", "resume.safetensors"):
            assert mixing[:64] not in path.read_bytes(), path


def test_an_adapter_that_no_operator_may_see_is_for_its_owner_alone_from_its_first_byte(
    connect, film_examples, tmp_path, monkeypatch
):
    """Under padded LoRA the adapter is the secret that pads hide."""
    model = trained(connect(), film_examples, PaddedLoRA())
    monkeypatch.setattr(os, "replace", lambda *_: None)  # as if the crash came when all was written
    model.save_pretrained(tmp_path)
    partial = [path for path in tmp_path.iterdir() if path.name.startswith("adapter_model")]
    monkeypatch.undo()
    model.save_pretrained(tmp_path)
    for path in [*partial, tmp_path / "adapter_model.safetensors"]:
        if path.exists():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [path.name for path in partial] == ["adapter_model.safetensors.part"], "it replaces the last one in one step"


def test_a_checkpoint_of_another_model_is_refused(connect, film_examples, tmp_path, tiny_server):
    trained(connect(), film_examples, LoRA()).save_pretrained(tmp_path)
    other = Backbone([tiny_server.url], model="roberta", adapter=adapter_config(tmp_path))
    with pytest.raises(CheckpointError, match=r"was trained on .*bert.* the operators host .*roberta"):
        PrivateModel.from_pretrained(tmp_path, other)
    other.close()


@pytest.mark.parametrize(
    "name", ["blindtune.json", "head.safetensors", "secret.safetensors", "adapter_model.safetensors"]
)
def test_an_incomplete_checkpoint_names_the_file(connect, film_examples, tmp_path, name):
    trained(connect(), film_examples, LoRA()).save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        PrivateModel.from_pretrained(tmp_path, connect())


def test_one_operator_is_enough_to_predict_with_a_model_that_two_trained(connect, film_examples, tmp_path):
    model = trained(connect(), film_examples, P3EFT())
    model.save_pretrained(tmp_path)
    again = PrivateModel.from_pretrained(
        tmp_path, connect(count=1, adapter=adapter_config(tmp_path)), predict_only=True
    )
    texts = [str(t) for t in film_examples.texts[:5]]
    with torch.no_grad():
        assert torch.equal(model(texts).logits, again(texts).logits)


def test_a_padded_adapter_needs_two_operators_to_predict_too(connect, film_examples, tmp_path):
    trained(connect(), film_examples, PaddedLoRA()).save_pretrained(tmp_path)
    again = PrivateModel.from_pretrained(
        tmp_path, connect(count=1, adapter=adapter_config(tmp_path)), predict_only=True
    )
    with pytest.raises(SingleOperator, match=r"needs 2 operators.*Add an operator \(--server\).*predictions too"):
        again([str(film_examples.texts[0])])


def test_another_seed_has_another_a_and_its_checkpoint_is_refused(connect, film_examples, tmp_path):
    trained(connect(), film_examples, PaddedLoRA()).save_pretrained(tmp_path)
    summary = json.loads((tmp_path / "blindtune.json").read_text())
    (tmp_path / "blindtune.json").write_text(json.dumps({**summary, "seed": 1}))
    with pytest.raises(CheckpointError, match="than the seed of this run gives"):
        PrivateModel.from_pretrained(tmp_path, connect(adapter=adapter_config(tmp_path)))


def test_a_foreign_head_must_be_brought_along(connect, film_examples, tmp_path):
    backbone = connect()
    head = torch.nn.Linear(backbone.hidden_size, 2)
    PrivateModel(backbone, head, LoRA()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"head is a Linear.*head="):
        PrivateModel.from_pretrained(tmp_path, connect())
    loaded = PrivateModel.from_pretrained(tmp_path, connect(), head=torch.nn.Linear(backbone.hidden_size, 2))
    assert torch.equal(loaded.head.weight, head.weight)
