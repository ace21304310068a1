"""A decoder in three parts computes what the whole one computes, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blindtune.errors import CheckpointError, ConfigError
from blindtune.models import Cut, FrozenBackbone, SplitModel, load_backbone
from blindtune.models.split import build_part, config_from_json, pack, padding_mask, tie, unpack
from tests.tiny_causal import FAMILIES

NAMES = FAMILIES
LENGTHS = torch.tensor([9, 4, 1])


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(4, 100, (3, 9), generator=torch.Generator().manual_seed(seed))


def whole_logits(split: SplitModel, ids: Tensor) -> Tensor:
    causal: Any = split.causal
    with torch.no_grad():
        return causal(input_ids=ids, attention_mask=padding_mask(LENGTHS, ids.shape[1])).logits


def load(tiny_causal: dict[str, Path], name: str, cut: Cut) -> FrozenBackbone:
    return load_backbone(str(tiny_causal[name]), cut=cut)


@pytest.mark.parametrize("cut", [Cut(2, 2), Cut(1, 3), Cut(1, 1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_parts_in_a_row_are_the_whole_model(tiny_causal: dict[str, Path], name: str, cut: Cut) -> None:
    split = load(tiny_causal, name, cut).split
    assert split is not None
    parts = split.parts
    with torch.no_grad():
        smashed = parts["bottom"](tokens(), LENGTHS)
        carried = parts["trunk"](smashed, LENGTHS)
        logits = parts["top"].logits(parts["top"](carried, LENGTHS))
    assert torch.equal(logits, whole_logits(split, tokens()))
    assert not torch.equal(smashed, carried)  # the trunk does something


@pytest.mark.parametrize("name", NAMES)
def test_parts_from_their_weights_alone(tiny_causal: dict[str, Path], name: str) -> None:
    split = load(tiny_causal, name, Cut(2, 2)).split
    assert split is not None
    config = config_from_json(split.config.to_json_string())
    own = {part: build_part(config, part, split.cut, split.parts[part].weights()) for part in split.parts}
    tie(own["bottom"], own["top"])
    with torch.no_grad():
        carried = own["trunk"](own["bottom"](tokens(), LENGTHS), LENGTHS)
        logits = own["top"].logits(own["top"](carried, LENGTHS))
    assert torch.equal(logits, whole_logits(split, tokens()))


@pytest.mark.parametrize(("name", "tied"), [("llama", True), ("opt", True), ("qwen2", False)])
def test_a_tied_head_is_not_sent_twice(tiny_causal: dict[str, Path], name: str, tied: bool) -> None:
    split = load(tiny_causal, name, Cut(2, 2)).split
    assert split is not None
    assert ("lm_head.weight" in split.parts["top"].weights()) is not tied


def test_every_weight_is_in_one_part_under_its_own_name(tiny_causal: dict[str, Path]) -> None:
    split = load(tiny_causal, "qwen2", Cut(2, 2)).split
    assert split is not None
    names = [name for part in split.parts.values() for name in part.weights()]
    assert sorted(names) == sorted(split.causal.state_dict())
    ends = sum(split.parts[p].weights()[n].numel() for p in ("bottom", "top") for n in split.parts[p].weights())
    assert split.weights_shared() == pytest.approx(ends / sum(t.numel() for t in split.causal.state_dict().values()))


def test_adapters_work_on_a_split_model_too(tiny_causal: dict[str, Path]) -> None:
    """One process offers both ways of training."""
    whole, split = load_backbone(str(tiny_causal["llama"])), load(tiny_causal, "llama", Cut(2, 2))
    assert whole.fingerprint == split.fingerprint
    assert whole.lora.shapes == split.lora.shapes


@pytest.mark.parametrize("cut", [Cut(0, 2), Cut(2, 0), Cut(2, 3), Cut(5, 1), Cut(-1, 2)], ids=str)
def test_cuts_out_of_range(tiny_causal: dict[str, Path], cut: Cut) -> None:
    with pytest.raises(ConfigError, match=r"of 5: every part needs a block.*at most 4"):
        load(tiny_causal, "llama", cut)


def test_a_model_without_a_decoder_stack(tiny_models: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"'bert' can't be split.*llama"):
        load_backbone(str(tiny_models["bert"]), cut=Cut(1, 1))


def test_a_configuration_of_another_family() -> None:
    with pytest.raises(ConfigError, match="gpt2"):
        config_from_json('{"model_type": "gpt2"}')


def test_weights_of_another_cut(tiny_causal: dict[str, Path]) -> None:
    split = load(tiny_causal, "llama", Cut(2, 2)).split
    assert split is not None
    with pytest.raises(CheckpointError, match=r"bottom.*layers"):
        build_part(split.config, "bottom", Cut(1, 2), split.parts["bottom"].weights())


def test_packing_drops_padding_and_comes_back() -> None:
    padded = torch.randn(3, 9, 5) * padding_mask(LENGTHS, 9).unsqueeze(-1)
    packed = pack(padded, LENGTHS)
    assert packed.shape == (14, 5)
    assert torch.equal(unpack(packed, LENGTHS), padded)


def test_gradients_pass_unpacking() -> None:
    packed = torch.randn(14, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pack(unpack(x, LENGTHS).sin(), LENGTHS), packed)
