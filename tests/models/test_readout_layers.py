"""Readout of several layers: equal to transformers' own hidden states, with adapters and without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig

from blindtune.errors import UnknownReadout
from blindtune.models import FrozenBackbone, LoraAdapter
from blindtune.models.readout import POOLINGS, pool, projection_matrix
from blindtune.wire import Limits, Projection, Readout
from tests.models.test_lora import batch
from tests.tiny import HIDDEN, LAYERS, NAMES

LoadTiny = Callable[..., FrozenBackbone]
PUBLIC = Projection(seed="5" * 64, size=8)


def all_states(backbone: FrozenBackbone, tokens) -> list[torch.Tensor]:
    """Every state `(B, L, d)` (of the decoder), by transformers alone."""
    ids = tokens.input_ids.long()
    mask = (torch.arange(ids.shape[1]) < tokens.lengths.unsqueeze(1)).long()
    arguments = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True}
    with torch.no_grad():
        if backbone.architecture == "encoder-decoder":
            start = torch.full((len(ids), 1), backbone.config.decoder_start_token_id)
            return list(backbone.model(**arguments, decoder_input_ids=start).decoder_hidden_states)
        return list(backbone.model(**arguments).hidden_states)


@pytest.mark.parametrize("name", NAMES)
def test_each_layer_is_that_of_transformers(name: str, tiny_backbone: LoadTiny):
    backbone, tokens = tiny_backbone(name, "float64"), batch(5, 7, seed=2)
    expected = all_states(backbone, tokens)
    if name == "opt":  # it projects its output to another size, so it offers the last state alone
        assert backbone.states == 1
        return
    assert backbone.states == len(expected) == LAYERS + 1
    for pooling in POOLINGS[backbone.architecture]:
        length = expected[0].shape[1]
        mask = (torch.arange(length) < tokens.lengths.unsqueeze(1)) if length > 1 else torch.ones(5, 1)
        layers = (0, 2, LAYERS)
        found = backbone.forward(tokens, Readout(pooling=pooling, layers=layers))[0]
        wanted = torch.cat([pool(expected[layer], mask.long(), pooling) for layer in layers], dim=-1)
        real = mask.bool()
        difference = found - wanted
        assert float((difference[real] if pooling == "none" else difference).abs().max()) < 1e-9


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "deberta"])
@pytest.mark.parametrize("block", [0, 2])
def test_adapters_change_the_layers_above_them_alone(name: str, block: int, tiny_backbone: LoadTiny):
    """Layers below the first adapted block run once, and their states are the same for every adapter."""
    backbone, tokens = tiny_backbone(name, "float64"), batch(4, 6, seed=1)
    modules = [m for m in backbone.lora.shapes if (f".{block}." in m and "encoder" in m) or f"layers.{block}." in m]
    if name == "t5":
        modules = [m for m in backbone.lora.shapes if m.startswith(f"decoder.block.{block}.")]
    info = backbone.info(name, Limits())
    config = LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
    adapters = [LoraAdapter(config, info, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    weights = torch.stack([adapter.vector().detach().double() for adapter in adapters])
    pooling = POOLINGS[backbone.architecture][0]
    layers = tuple(range(LAYERS + 1))
    readout = Readout(pooling=pooling, layers=layers)
    frozen = backbone.forward(tokens, readout).unflatten(-1, (LAYERS + 1, HIDDEN))[0]
    both = backbone.forward(tokens, readout, adapters[0].layout, weights).unflatten(-1, (LAYERS + 1, HIDDEN))
    for index, adapter in enumerate(adapters):
        alone = backbone.forward(tokens, readout, adapter.layout, weights[index : index + 1])
        assert torch.allclose(both[index].flatten(-2), alone[0], atol=1e-12)
    moved = (both - frozen).abs().amax((1, 3)) > 1e-9  # (n, k)
    assert moved.tolist() == [[layer > block for layer in layers]] * 2


def test_gradients_flow_from_every_layer(tiny_backbone: LoadTiny):
    backbone, tokens = tiny_backbone("bert", "float64"), batch(4, 6, seed=1)
    config = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    adapter = LoraAdapter(config, backbone.info("bert", Limits()))
    leaf = adapter.vector().detach().double().unsqueeze(0).requires_grad_()
    hidden = backbone.forward(tokens, Readout(pooling="mean", layers=(1, 3)), adapter.layout, leaf)
    direction = torch.randn(leaf.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cotangent = torch.randn(hidden.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad(hidden, leaf, cotangent)
    with torch.no_grad():
        ahead, behind = (
            backbone.forward(tokens, Readout(pooling="mean", layers=(1, 3)), adapter.layout, leaf + step * direction)
            for step in (1e-5, -1e-5)
        )
    assert float((gradient * direction).sum()) == pytest.approx(
        float(((ahead - behind) / 2e-5 * cotangent).sum()), rel=1e-6
    )


class TestProjection:
    def test_is_public_and_the_same_everywhere(self):
        matrix = projection_matrix(PUBLIC, HIDDEN)
        assert matrix.shape == (HIDDEN, 8)
        assert torch.equal(matrix.abs(), torch.full((HIDDEN, 8), 8**-0.5))
        assert matrix[0].sign().tolist() == [1, -1, 1, 1, -1, -1, -1, -1]  # the first byte of the keystream
        assert not torch.equal(matrix, projection_matrix(Projection(seed="6" * 64, size=8), HIDDEN))

    def test_is_applied_to_every_token_of_every_layer(self, tiny_backbone: LoadTiny):
        backbone, tokens = tiny_backbone("bert"), batch(3, 5)
        plain = backbone.forward(tokens, Readout(pooling="none", layers=(0, 3)))
        small = backbone.forward(tokens, Readout(pooling="none", layers=(0, 3), projection=PUBLIC))
        expected = plain.unflatten(-1, (2, HIDDEN)) @ projection_matrix(PUBLIC, HIDDEN)
        assert torch.allclose(small.unflatten(-1, (2, 8)), expected, atol=1e-5)


class TestRefusals:
    @pytest.mark.parametrize(
        ("readout", "words"),
        [
            (Readout(pooling="mean", layers=(LAYERS + 1,)), f"no layer {LAYERS + 1}"),
            (Readout(pooling="mean", layers=(2, 1)), "rising order"),
            (Readout(pooling="mean", layers=(1, 1)), "rising order"),
            (Readout(pooling="last"), "no pooling 'last'"),
            (Readout(pooling="mean", projection=Projection(seed="0" * 64, size=HIDDEN + 1)), f"to {HIDDEN + 1} values"),
        ],
    )
    def test_what_the_model_does_not_offer(self, readout: Readout, words: str, tiny_backbone: LoadTiny):
        with pytest.raises(UnknownReadout, match=words) as caught:
            tiny_backbone("bert").forward(batch(2, 3), readout)
        assert caught.value.remedy
