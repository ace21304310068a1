"""A decoder in three parts computes what the whole one computes, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blindtune.errors import CheckpointError, ConfigError
from blindtune.models import Cut, CutModel, FrozenBackbone, load_backbone
from blindtune.models.cut.parts import build_part, config_from_json, pack, padding_mask, tie, unpack
from tests.tiny_causal import FAMILIES

NAMES = FAMILIES
LENGTHS = torch.tensor([9, 4, 1])


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(4, 100, (3, 9), generator=torch.Generator().manual_seed(seed))


def whole_logits(cut_model: CutModel, ids: Tensor) -> Tensor:
    causal: Any = cut_model.causal
    with torch.no_grad():
        return causal(input_ids=ids, attention_mask=padding_mask(LENGTHS, ids.shape[1])).logits


def load(tiny_causal: dict[str, Path], name: str, cut: Cut) -> FrozenBackbone:
    return load_backbone(str(tiny_causal[name]), cut=cut)


@pytest.mark.parametrize("cut", [Cut(2, 2), Cut(1, 3), Cut(1, 1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_parts_in_a_row_are_the_whole_model(tiny_causal: dict[str, Path], name: str, cut: Cut) -> None:
    cut_model = load(tiny_causal, name, cut).require_cut()
    parts = cut_model.parts
    with torch.no_grad():
        smashed = parts["bottom"](tokens(), LENGTHS)
        trunk_output = parts["trunk"](smashed, LENGTHS)
        logits = parts["top"].logits(parts["top"](trunk_output, LENGTHS))
    assert torch.equal(logits, whole_logits(cut_model, tokens()))
    assert not torch.equal(smashed, trunk_output)  # the trunk does something


@pytest.mark.parametrize("name", NAMES)
def test_parts_from_their_weights_alone(tiny_causal: dict[str, Path], name: str) -> None:
    cut_model = load(tiny_causal, name, Cut(2, 2)).require_cut()
    config = config_from_json(cut_model.config.to_json_string())
    own = {part: build_part(config, part, cut_model.cut, cut_model.parts[part].weights()) for part in cut_model.parts}
    tie(own["bottom"], own["top"])
    with torch.no_grad():
        trunk_output = own["trunk"](own["bottom"](tokens(), LENGTHS), LENGTHS)
        logits = own["top"].logits(own["top"](trunk_output, LENGTHS))
    assert torch.equal(logits, whole_logits(cut_model, tokens()))


@pytest.mark.parametrize(("name", "tied"), [("llama", True), ("opt", True), ("qwen2", False)])
def test_a_tied_head_is_not_sent_twice(tiny_causal: dict[str, Path], name: str, tied: bool) -> None:
    cut_model = load(tiny_causal, name, Cut(2, 2)).require_cut()
    assert ("lm_head.weight" in cut_model.parts["top"].weights()) is not tied


def test_every_weight_is_in_one_part_under_its_own_name(tiny_causal: dict[str, Path]) -> None:
    cut_model = load(tiny_causal, "qwen2", Cut(2, 2)).require_cut()
    names = [name for part in cut_model.parts.values() for name in part.weights()]
    assert sorted(names) == sorted(cut_model.causal.state_dict())
    ends = sum(cut_model.parts[p].weights()[n].numel() for p in ("bottom", "top") for n in cut_model.parts[p].weights())
    assert cut_model.weights_shared() == pytest.approx(
        ends / sum(t.numel() for t in cut_model.causal.state_dict().values())
    )


def test_adapters_work_on_a_cut_model_too(tiny_causal: dict[str, Path]) -> None:
    """One process offers both ways of training."""
    whole, cut = load_backbone(str(tiny_causal["llama"])), load(tiny_causal, "llama", Cut(2, 2))
    assert whole.fingerprint == cut.fingerprint
    assert whole.lora.shapes == cut.lora.shapes


@pytest.mark.parametrize("cut", [Cut(0, 2), Cut(2, 0), Cut(2, 3), Cut(5, 1), Cut(-1, 2)], ids=str)
def test_cuts_out_of_range(tiny_causal: dict[str, Path], cut: Cut) -> None:
    with pytest.raises(ConfigError, match=r"of 5: every part needs a block.*at most 4"):
        load(tiny_causal, "llama", cut)


def test_a_model_without_a_decoder_stack(tiny_models: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"'bert' can't be cut.*llama"):
        load_backbone(str(tiny_models["bert"]), cut=Cut(1, 1))


def test_a_configuration_of_another_family() -> None:
    with pytest.raises(ConfigError, match="gpt2"):
        config_from_json('{"model_type": "gpt2"}')


def test_weights_of_another_cut(tiny_causal: dict[str, Path]) -> None:
    cut_model = load(tiny_causal, "llama", Cut(2, 2)).require_cut()
    with pytest.raises(CheckpointError, match=r"bottom.*layers"):
        build_part(cut_model.config, "bottom", Cut(1, 2), cut_model.parts["bottom"].weights())


def test_packing_drops_padding_and_comes_back() -> None:
    padded = torch.randn(3, 9, 5) * padding_mask(LENGTHS, 9).unsqueeze(-1)
    packed = pack(padded, LENGTHS)
    assert packed.shape == (14, 5)
    assert torch.equal(unpack(packed, LENGTHS), padded)


def test_gradients_pass_unpacking() -> None:
    packed = torch.randn(14, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pack(unpack(x, LENGTHS).sin(), LENGTHS), packed)
