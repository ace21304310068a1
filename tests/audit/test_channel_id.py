"""Channels are compared by their fields. Their labels, which reports and JSON show, stay as they are."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from blindtune.audit import FROZEN_MODEL, ChannelId, ChannelKind, Control, Finding, Knowledge
from blindtune.audit.channels import computed_channels
from blindtune.audit.labels import ATTACKS, SHARE_ATTACKS, UPDATE_ATTACKS, recombine, summed
from blindtune.audit.labels.boosting import NAME
from blindtune.audit.labels.registry import catalogue

ACTIVATION, SHIFT, SENT, GRADIENT, UPDATE = ChannelKind
LABELS = {
    ChannelId(ACTIVATION, adapter=0): "activation 0",
    ChannelId(ACTIVATION, modifier="joint"): "activations joint",
    ChannelId(ACTIVATION, adapter=0, modifier="minus 1"): "activation 0 minus 1",
    ChannelId(ACTIVATION, modifier="of A minus B"): "activation of A minus B",
    ChannelId(ACTIVATION, adapter=1, modifier="of A minus B"): "activation 1 of A minus B",
    ChannelId(SHIFT, adapter=2, modifier="since the first step"): "shift 2 since the first step",
    ChannelId(SHIFT, adapter=0, modifier="of the mean adapter"): "shift 0 of the mean adapter",
    ChannelId(SHIFT, modifier="joint"): "shifts joint",
    ChannelId(SHIFT, modifier="in common"): "shifts in common",
    ChannelId(SENT, adapter=0, modifier="at the base"): "sent activation 0 at the base",
    ChannelId(GRADIENT, adapter=1, share=0): "gradient 1.0",
    ChannelId(GRADIENT, modifier="joint", share=1): "gradients joint.1",
    ChannelId(GRADIENT, modifier="summed"): "gradients summed",
    ChannelId(GRADIENT, modifier="recombined, summed"): "gradient recombined, summed",
    ChannelId(UPDATE, modifier="inverted, Adam"): "update inverted, Adam",
    FROZEN_MODEL: "frozen model",
    ChannelId(SENT, adapter=0, modifier="at the base", control=Control.FROZEN): (
        "frozen model: sent activation 0 at the base"
    ),
    ChannelId(SHIFT, adapter=0, control=Control.SHUFFLED): "frozen model, shuffled adapter: shift 0",
    ChannelId(ACTIVATION, modifier="joint", control=Control.SHUFFLED): (
        "frozen model, shuffled adapter: activations joint"
    ),
}


@pytest.mark.parametrize(("channel", "label"), LABELS.items(), ids=LABELS.values())
def test_labels(channel, label):
    assert str(channel) == f"{channel}" == label


def test_equal_channels_are_equal_keys():
    assert ChannelId(SHIFT, adapter=0) == ChannelId(SHIFT, adapter=0)
    assert len(LABELS) == len({str(channel) for channel in LABELS})


def test_a_control_observes_no_kind():
    gradient = ChannelId(GRADIENT, adapter=0)
    assert gradient.observes(SHIFT, GRADIENT)
    assert not gradient.observes(SHIFT)
    for control in (Control.FROZEN, Control.SHUFFLED):
        assert replace(gradient, control=control).is_control
        assert not replace(gradient, control=control).observes(GRADIENT)
    assert FROZEN_MODEL.is_control
    assert not gradient.is_control


def test_attacks_are_made_for_kinds_of_channels():
    assert ATTACKS[NAME].fits(ChannelId(GRADIENT, modifier="joint"))
    assert not ATTACKS[NAME].fits(ChannelId(SHIFT, adapter=0))
    assert not ATTACKS[NAME].fits(ChannelId(GRADIENT, adapter=0, control=Control.FROZEN))
    assert ATTACKS["spectral"].fits(FROZEN_MODEL)


def test_knowledge_has_the_texts_of_tables():
    assert [str(knows) for knows in Knowledge] == [
        "nothing",
        "which component",
        "16 labels",
        "64 labels",
        "256 labels",
        "all other labels",
    ]
    assert all(isinstance(declaration.knows, Knowledge) for declaration in catalogue())


def test_json_holds_texts():
    channel = ChannelId(SHIFT, adapter=0, modifier="since the previous snapshot")
    finding = Finding("A", channel, "spectral", Knowledge.NOTHING, 3, 100, 0.75, 0.5, 1.0)
    assert json.loads(json.dumps(finding.to_json())) == {
        "operator": "A",
        "channel": "shift 0 since the previous snapshot",
        "attack": "spectral",
        "knows": "nothing",
        "step": 3,
        "texts": 100,
        "auc": 0.75,
        "low": 0.5,
        "high": 1.0,
    }


def test_channels_of_several_adapters():
    hidden = np.random.default_rng(0).normal(size=(3, 60, 4)).astype(np.float32)
    known = {("now",) * 3: hidden, ("then",) * 3: hidden + 1, (): np.zeros((1, 60, 4), np.float32)}
    recompute = cast(Any, SimpleNamespace(hidden=lambda view, adapters, rows: known[adapters]))
    earlier = {"the first step": ("then",) * 3, "the previous snapshot": ("now",) * 3}
    channels = computed_channels(cast(Any, None), recompute, ("now",) * 3, earlier, [(i,) for i in range(60)])
    assert [str(channel) for channel in channels] == [
        *(
            f"{name} {i}{since}"
            for i in range(3)
            for name, since in (("activation", ""), ("shift", ""), ("shift", " since the first step"))
        ),
        "activations joint",
        "shifts joint",
        "shifts in common",
        "activation 0 minus 1",
        "activation 0 minus 2",
    ]
    difference = channels[ChannelId(ACTIVATION, adapter=0, modifier="minus 2")]
    np.testing.assert_array_equal(difference, hidden[0] - hidden[2])


def test_channels_of_shares_and_updates():
    shares = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    assert [str(channel) for channel in {**summed(shares), **recombine(shares)}] == [
        "gradients summed.0",
        "gradients summed.1",
        "gradient recombined",
        "gradient recombined, summed",
        "gradient loudest",
        "gradient loudest, summed",
    ]
    assert [str(channel) for channel in summed(shares[:1])] == ["gradients summed"]
    assert list(UPDATE_ATTACKS) == [str(attack.channel) for attack in UPDATE_ATTACKS.values()]
    assert set(SHARE_ATTACKS) >= {"Gram matrix", "sum over adapters"}
