"""Operators in this process, which experiments use, are the same as real ones; arms by name, curves, audits."""

import pytest
import torch

from blindtune.cli.options import make_lora_config
from blindtune.client import Backbone
from blindtune.methods import P3EFT, LinearHead, PrivateModel, make_method
from blindtune.models import load_backbone
from blindtune.privacy.randomness import SecureGenerator
from blindtune.training import TrainConfig, Trainer
from blindtune.wire import Transcript
from experiments.labels.run import Arm
from experiments.local import LowerLayers, close_pool, local_pool

STEPS = 4


def train(backbone, examples):
    """Weights after a few steps of P3EFT with a fixed key."""
    backbone.adapter_config = make_lora_config(backbone.info, rank=4, alpha=8, targets=None, layers="1-1")
    method = P3EFT(steps=STEPS)
    head = LinearHead(backbone.hidden_size, 2)
    model = PrivateModel(backbone, head, method, generator=SecureGenerator(bytes(32)), seed=1)
    trainer = Trainer(model, examples, TrainConfig(steps=STEPS, batch_size=16, seed=1))
    trainer.prepare()
    for _ in trainer.steps():
        pass
    return backbone.lora_adapters()[0].vector().detach()


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_local_operators_train_what_real_ones_train(name, start_server, tiny_models, film_examples, tmp_path):
    examples = film_examples.take(range(64))
    with start_server(tiny_models[name]) as a, start_server(tiny_models[name]) as b:
        urls = [a.url, b.url]
        remote = Backbone(urls, num_adapters=0, max_length=32)
        expected = train(remote, examples)
        remote.close()
    model = load_backbone(str(tiny_models[name]))
    lower = LowerLayers(model, 1)
    pool = local_pool(model, [tmp_path / "a", tmp_path / "b"])
    for operator, url in zip(pool.operators, urls, strict=True):
        operator.transport.url = url  # which pads and shares are bound to
    local = Backbone(pool, num_adapters=0, max_length=32)
    lower.compute(local.rows(examples.texts), local.tokenizer)
    found = train(local, examples)
    close_pool(pool)
    assert len(lower.known) == len(set(local.rows(examples.texts)))
    # Adam makes whole steps of gradients as small as the shares' rounding
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.98
    assert torch.isfinite(found).all()
    kinds = [event.kind for event in Transcript(tmp_path / "a").events]
    assert kinds.count("backward") == STEPS


def test_known_lower_layers_change_nothing(tiny_models, film_sentences, tmp_path):
    model = load_backbone(str(tiny_models["bert"]))
    pool = local_pool(model, [tmp_path / "a"])
    tokenizer = pool.operators[0].tokenizer()
    rows = tokenizer.rows(film_sentences[:20], max_length=32)
    before = model.forward(tokenizer.pad(rows), "mean")
    lower = LowerLayers(model, 1)
    lower.compute(rows, tokenizer)
    ran = []
    model.model.embeddings.register_forward_hook(lambda *_: ran.append("embeddings"))
    model.lora.blocks[0].attention.register_forward_hook(lambda *_: ran.append("block 0"))
    after = model.forward(tokenizer.pad(rows), "mean")
    close_pool(pool)
    assert ran == ["embeddings"]
    assert torch.allclose(before, after, atol=1e-5)


def test_an_arm_is_read_from_its_name():
    arm = Arm.parse('p3eft_published+lr=0.001+epochs=2+mixing_scale=1.0+regularizer="flip"')
    assert (arm.method, arm.lr, arm.epochs, arm.rank) == ("p3eft_published", 0.001, 2, None)
    assert arm.options == {"mixing_scale": 1.0, "regularizer": "flip"}
    assert Arm.parse("lora") == Arm("lora", "lora", {})
    make_method(arm.method, arm.options)
