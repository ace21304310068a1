"""Tuned ends in a whole model: the same numbers as stock PEFT and transformers give, and clear refusals."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from blindtune.errors import CheckpointError, InvalidTensor
from blindtune.models import Cut, CutModel, load_backbone
from blindtune.models.cut.merge import tunable_weights, with_tuned_parts
from blindtune.texts import Ends, merge_checkpoint, read_tuned_parts
from tests.tiny_causal import FAMILIES

IDS = torch.randint(4, 400, (2, 9), generator=torch.Generator().manual_seed(0))


def cut_model_of(folder) -> CutModel:
    return load_backbone(str(folder), cut=Cut(1, 2)).require_cut()


def tuned_checkpoint(folder, tune: str, output):
    """Ends of a model of its own, changed at random and saved."""
    cut_model = cut_model_of(folder)
    ends = Ends(cut_model.parts["bottom"], cut_model.parts["top"], tune=tune, rank=2, alpha=6)
    with torch.no_grad():
        for index, parameter in enumerate(ends.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    ends.save(output, str(folder))
    return output


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_logits_are_those_of_stock_tools(tiny_causal, tmp_path, family, tune):
    folder = tiny_causal[family]
    checkpoint = tuned_checkpoint(folder, tune, tmp_path)
    cut_model = cut_model_of(folder)
    before = cut_model.causal(IDS).logits
    deployed = with_tuned_parts(cut_model, *read_tuned_parts(checkpoint))
    stock = AutoModelForCausalLM.from_pretrained(folder)
    if tune == "lora":
        stock = PeftModel.from_pretrained(stock, checkpoint).merge_and_unload()
    else:
        tensors, _ = read_tuned_parts(checkpoint)
        assert not stock.load_state_dict(tensors, strict=False).unexpected_keys
    expected = stock.eval()(IDS).logits
    torch.testing.assert_close(deployed(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected - before).abs().max() > 0.01
    assert torch.equal(cut_model.causal(IDS).logits, before)  # the hosted model is as it was
    shared = {p.data_ptr() for p in cut_model.causal.parameters()}
    own = [name for name, p in deployed.named_parameters() if p.data_ptr() not in shared]
    assert own
    assert all(any(f".layers.{index}." in name for index in (0, 3, 4)) for name in own)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_weights_may_be_of_the_ends_blocks(tiny_causal, family):
    names = tunable_weights(cut_model_of(tiny_causal[family]), ("bottom", "top"))
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == {0, 3, 4}
    assert not [name for name in names if "embed" in name or "lm_head" in name]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t: {}, "no tuned weights"),
        (lambda t: {**t, next(iter(t)): next(iter(t.values())) * float("nan")}, "NaN"),
        (lambda t: {k.replace(".layers.0.", ".layers.7."): v for k, v in t.items()}, "don't fit"),
        (lambda t: {k: v[:, :3] if "lora_A" in k else v for k, v in t.items()}, "don't fit"),
        (lambda t: {k: v[:1] if "lora_A" in k else v for k, v in t.items()}, "two ranks"),
        (lambda t: {k: v for k, v in t.items() if "lora_B" not in k}, "no pair"),
        (lambda t: {**t, "lm_head.weight": torch.zeros(2, 2)}, "no pair"),
    ],
)
def test_ends_that_do_not_fit(tiny_causal, tmp_path, damage, says):
    tensors, scaling = read_tuned_parts(tuned_checkpoint(tiny_causal["llama"], "lora", tmp_path))
    with pytest.raises(InvalidTensor, match=says):
        with_tuned_parts(cut_model_of(tiny_causal["llama"]), damage(tensors), scaling)


def test_whole_weights_of_the_trunk_are_refused(tiny_causal):
    cut_model = cut_model_of(tiny_causal["llama"])
    name, tensor = next((n, t) for n, t in cut_model.causal.state_dict().items() if ".layers.1." in n)
    with pytest.raises(InvalidTensor, match="no weight that may be tuned"):
        with_tuned_parts(cut_model, {name: tensor}, None)


def test_a_start_from_ends_that_were_cut_elsewhere(tiny_causal, tmp_path):
    checkpoint = tuned_checkpoint(tiny_causal["llama"], "lora", tmp_path)  # of blocks 0, 3 and 4
    cut_model = load_backbone(str(tiny_causal["llama"]), cut=Cut(1, 1)).require_cut()
    ends = Ends(cut_model.parts["bottom"], cut_model.parts["top"], tune="full")
    with pytest.raises(CheckpointError, match="don't fit"):
        merge_checkpoint(ends, checkpoint)
