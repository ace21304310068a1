"""Checkpoints: what is saved is what was trained, in PEFT's format, and secrets are for the owner alone."""

import stat

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

from blindtune.client import Backbone
from blindtune.errors import CheckpointError
from blindtune.methods import (
    P3EFT,
    HeadOnly,
    LinearHead,
    LoRA,
    PrivateModel,
    PublishedP3EFT,
    adapter_config,
    load_model,
    save_model,
)


def trained(backbone, film_examples, method):
    texts, labels = [str(t) for t in film_examples.texts[:16]], film_examples.labels[:16]
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), method)
    model.prepare(texts, labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(texts, labels).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("method", [LoRA, HeadOnly, P3EFT, PublishedP3EFT])
def test_a_loaded_model_predicts_the_same(connect, film_examples, tmp_path, method):
    model = trained(connect(), film_examples, method())
    save_model(model, tmp_path, classes=["bad", "good"])
    again = load_model(tmp_path, connect(adapter=adapter_config(tmp_path)))
    texts = [str(t) for t in film_examples.texts[20:30]]
    with torch.no_grad():
        assert torch.equal(model(texts).logits, again(texts).logits)


def test_adapters_load_into_stock_peft_with_equal_hidden_states(connect, film_examples, tiny_models, tmp_path):
    model = trained(connect(), film_examples, PublishedP3EFT())
    save_model(model, tmp_path)
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
    model = trained(connect(), film_examples, PublishedP3EFT())
    save_model(model, tmp_path, resume={})
    for name in ("secret.safetensors", "resume.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    mixing = model.method.mixing.numpy().tobytes()
    assert mixing in (tmp_path / "secret.safetensors").read_bytes()
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name not in ("secret.safetensors", "resume.safetensors"):
            assert mixing[:64] not in path.read_bytes(), path


def test_a_checkpoint_of_another_model_is_refused(connect, film_examples, tmp_path, tiny_server):
    save_model(trained(connect(), film_examples, LoRA()), tmp_path)
    other = Backbone([tiny_server.url], model="roberta", adapter=adapter_config(tmp_path))
    with pytest.raises(CheckpointError, match=r"was trained on .*bert.* the operators host .*roberta"):
        load_model(tmp_path, other)
    other.close()


@pytest.mark.parametrize(
    "name", ["blindtune.json", "head.safetensors", "secret.safetensors", "adapter_model.safetensors"]
)
def test_an_incomplete_checkpoint_names_the_file(connect, film_examples, tmp_path, name):
    save_model(trained(connect(), film_examples, LoRA()), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_model(tmp_path, connect())


def test_one_operator_is_enough_to_predict_with_a_model_that_two_trained(connect, film_examples, tmp_path):
    model = trained(connect(), film_examples, PublishedP3EFT())
    save_model(model, tmp_path)
    again = load_model(tmp_path, connect(count=1, adapter=adapter_config(tmp_path)), predict_only=True)
    texts = [str(t) for t in film_examples.texts[:5]]
    with torch.no_grad():
        assert torch.equal(model(texts).logits, again(texts).logits)


def test_a_foreign_head_must_be_brought_along(connect, film_examples, tmp_path):
    backbone = connect()
    head = torch.nn.Linear(backbone.hidden_size, 2)
    save_model(PrivateModel(backbone, head, LoRA()), tmp_path)
    with pytest.raises(CheckpointError, match=r"head is a Linear.*head="):
        load_model(tmp_path, connect())
    loaded = load_model(tmp_path, connect(), head=torch.nn.Linear(backbone.hidden_size, 2))
    assert torch.equal(loaded.head.weight, head.weight)
