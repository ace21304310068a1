"""Pooling: the same vector for a text alone and in a padded batch, and the model's own choice by default."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from blindtune.errors import UnknownReadout
from blindtune.models import FrozenBackbone, Tokens
from blindtune.models.readout import POOLINGS, default_pooling, pool
from blindtune.wire import Pooling
from tests.models.test_lora import batch, error
from tests.tiny import NAMES

LoadTiny = Callable[..., FrozenBackbone]
HIDDEN = torch.tensor([[[1.0, 10], [2, 20], [9, 90]], [[3, 30], [99, 99], [99, 99]]])  # (2, 3, 2)
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("cls", [[1, 10], [3, 30]]),
        ("first", [[1, 10], [3, 30]]),
        ("mean", [[4, 40], [3, 30]]),
        ("last", [[9, 90], [3, 30]]),
    ],
)
def test_each_pooling_by_hand(pooling: Pooling, expected: list[list[float]]):
    assert pool(HIDDEN, MASK, pooling).tolist() == expected


def test_none_keeps_every_position():
    assert torch.equal(pool(HIDDEN, MASK, "none"), HIDDEN)


def test_an_unknown_pooling_is_refused_by_name():
    with pytest.raises(UnknownReadout, match="'median'"):
        pool(HIDDEN, MASK, cast(Any, "median"))


@pytest.mark.parametrize("name", NAMES)
def test_a_padded_batch_gives_what_each_text_gives_alone(name: str, tiny_backbone: LoadTiny):
    backbone = tiny_backbone(name, "float64")
    tokens = batch(6, 9, seed=3)
    assert len(set(tokens.lengths.tolist())) > 2
    for pooling in POOLINGS[backbone.architecture]:
        together = backbone.forward(tokens, pooling)[0]
        for row, length in enumerate(tokens.lengths.tolist()):
            alone = backbone.forward(
                Tokens(tokens.input_ids[row : row + 1, :length], tokens.lengths[row : row + 1]), pooling
            )[0, 0]
            found = together[row, : len(alone)] if pooling == "none" else together[row]
            assert error(found, alone) <= 1e-11, (pooling, row)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "roberta"])
def test_what_padding_holds_makes_no_difference(name: str, tiny_backbone: LoadTiny):
    """Only RoBERTa counts positions by the padding token."""
    backbone = tiny_backbone(name, "float64")
    tokens = batch(4, 7)
    padding = torch.arange(7) >= tokens.lengths[:, None]
    other = Tokens(torch.where(padding, 17, tokens.input_ids), tokens.lengths)
    pooling = POOLINGS[backbone.architecture][0]
    assert error(backbone.forward(other, pooling), backbone.forward(tokens, pooling)) <= 1e-11


@pytest.mark.parametrize("name", NAMES)
def test_a_pooling_of_another_architecture_is_refused_with_what_there_is(name: str, tiny_backbone: LoadTiny):
    backbone = tiny_backbone(name)
    offered = POOLINGS[backbone.architecture]
    for pooling in {"cls", "mean", "last", "first", "none"} - set(offered):
        with pytest.raises(UnknownReadout, match=repr(pooling)) as caught:
            backbone.forward(batch(2, 3), pooling)
        assert ", ".join(offered) in caught.value.remedy


class TestDefault:
    def test_each_architecture_has_its_own(self, tmp_path: Path):
        assert default_pooling("encoder", str(tmp_path)) == "cls"
        assert default_pooling("decoder", str(tmp_path)) == "last"
        assert default_pooling("encoder-decoder", str(tmp_path)) == "first"

    @pytest.mark.parametrize(("mean", "expected"), [(True, "mean"), (False, "cls")])
    def test_a_sentence_transformer_keeps_what_it_was_trained_with(self, mean: bool, expected: str, tmp_path: Path):
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": mean}))
        assert default_pooling("encoder", str(tmp_path)) == expected
