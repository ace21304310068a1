"""Messages: closed, unchangeable, and equal after a round trip through JSON."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from blindtune.wire import ForwardRequest, Limits, LoraSpec, ModelInfo
from blindtune.wire.schema import Message

INFO = ModelInfo(
    name="m",
    architecture="encoder",
    model_type="bert",
    hidden_size=4,
    layers=1,
    dtype="float32",
    modules={"layer.0.query": (4, 4)},
    pooling="mean",
    poolings=["cls", "mean", "none"],
    token_type_ids=True,
    pad_token_id=0,
    fingerprint="f" * 64,
    base_model_name="m",
    limits=Limits(),
)


def test_every_message_refuses_unknown_fields_and_changes():
    kinds = Message.__subclasses__()
    assert len(kinds) >= 9
    assert all(kind.model_config.get("extra") == "forbid" and kind.model_config.get("frozen") for kind in kinds)


def test_a_model_description_survives_json():
    assert ModelInfo.model_validate_json(INFO.model_dump_json()) == INFO


def test_a_message_does_not_change_once_made():
    request = ForwardRequest(pooling="cls")
    with pytest.raises(ValidationError):
        request.pooling = "mean"  # pyright: ignore[reportAttributeAccessIssue]


def test_specs_that_differ_in_the_order_of_modules_differ():
    """The weight vector's layout follows that order."""
    first = LoraSpec(modules=["a", "b"], rank=1, scaling=1.0)
    assert first != LoraSpec(modules=["b", "a"], rank=1, scaling=1.0)
