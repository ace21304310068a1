"""Tuned ends in a whole model: the same numbers as stock PEFT and transformers give, and clear refusals."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from blindtune.errors import CheckpointError, InvalidTensor
from blindtune.methods.guarded import Ends, read_tuned
from blindtune.methods.guarded.ends import merge_checkpoint
from blindtune.models import Cut, SplitModel, load_backbone
from blindtune.models.plugged import plug_in, tunable_weights
from tests.tiny_causal import FAMILIES

IDS = torch.randint(4, 400, (2, 9), generator=torch.Generator().manual_seed(0))


def split_of(folder) -> SplitModel:
    split = load_backbone(str(folder), cut=Cut(1, 2)).split
    assert split is not None
    return split


def tuned_checkpoint(folder, trained: str, output):
    """Ends of a model of its own, changed at random and saved."""
    split = split_of(folder)
    ends = Ends(split.parts["bottom"], split.parts["top"], trained=trained, rank=2, alpha=6)
    with torch.no_grad():
        for index, parameter in enumerate(ends.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    ends.save(output, str(folder))
    return output


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trained", ["lora", "full"])
def test_logits_are_those_of_stock_tools(tiny_causal, tmp_path, family, trained):
    folder = tiny_causal[family]
    checkpoint = tuned_checkpoint(folder, trained, tmp_path)
    split = split_of(folder)
    before = split.causal(IDS).logits
    plugged = plug_in(split, *read_tuned(checkpoint))
    stock = AutoModelForCausalLM.from_pretrained(folder)
    if trained == "lora":
        stock = PeftModel.from_pretrained(stock, checkpoint).merge_and_unload()
    else:
        tensors, _ = read_tuned(checkpoint)
        assert not stock.load_state_dict(tensors, strict=False).unexpected_keys
    expected = stock.eval()(IDS).logits
    torch.testing.assert_close(plugged(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected - before).abs().max() > 0.01
    assert torch.equal(split.causal(IDS).logits, before)  # the hosted model is as it was
    shared = {p.data_ptr() for p in split.causal.parameters()}
    own = [name for name, p in plugged.named_parameters() if p.data_ptr() not in shared]
    assert own
    assert all(any(f".layers.{index}." in name for index in (0, 3, 4)) for name in own)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_weights_may_be_of_the_ends_blocks(tiny_causal, family):
    names = tunable_weights(split_of(tiny_causal[family]), ("bottom", "top"))
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
    tensors, scaling = read_tuned(tuned_checkpoint(tiny_causal["llama"], "lora", tmp_path))
    with pytest.raises(InvalidTensor, match=says):
        plug_in(split_of(tiny_causal["llama"]), damage(tensors), scaling)


def test_whole_weights_of_the_trunk_are_refused(tiny_causal):
    split = split_of(tiny_causal["llama"])
    name, tensor = next((n, t) for n, t in split.causal.state_dict().items() if ".layers.1." in n)
    with pytest.raises(InvalidTensor, match="no weight that may be tuned"):
        plug_in(split, {name: tensor}, None)


def test_a_start_from_ends_that_were_cut_elsewhere(tiny_causal, tmp_path):
    checkpoint = tuned_checkpoint(tiny_causal["llama"], "lora", tmp_path)  # of blocks 0, 3 and 4
    split = load_backbone(str(tiny_causal["llama"]), cut=Cut(1, 1)).split
    assert split is not None
    ends = Ends(split.parts["bottom"], split.parts["top"], trained="full")
    with pytest.raises(CheckpointError, match="don't fit"):
        merge_checkpoint(ends, checkpoint)
