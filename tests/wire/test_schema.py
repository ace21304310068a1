"""Messages: closed, unchangeable, and equal after a round trip through JSON."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from blindtune.errors import PROBLEMS, UnknownTunedParts
from blindtune.wire import ForwardRequest, GenerateRequest, Limits, LoraSpec, ModelInfo, ScoreRequest, decode, encode
from blindtune.wire.schema import CutInfo, Message

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


CUT_INFO = INFO.model_copy(update={"cut": CutInfo(bottom=2, top=1, parts=["bottom", "top"], weights_shared=0.5)})
CUT_INFO_JSON = (
    '{"name":"m","architecture":"encoder","model_type":"bert","hidden_size":4,"layers":1,"states":1,"dtype":"float32",'
    '"modules":{"layer.0.query":[4,4]},"peft_kinds":["lora"],"pooling":"mean","poolings":["cls","mean","none"],'
    f'"token_type_ids":true,"pad_token_id":0,"fingerprint":"{"f" * 64}","base_model_name":"m",'
    '"limits":{"max_body_bytes":268435456,"max_answer_bytes":1073741824,"max_header_bytes":1048576,"max_tensors":64,'
    '"max_tokens":65536,"max_length":512,"max_adapters":16,"max_cotangents":16,"max_rank":256,"max_directions":64},'
    '"split":{"bottom":2,"top":1,"parts":["bottom","top"],"codecs":["fp32","fp16","int8","int4"],"weights_shared":0.5}}'
)


def test_a_cut_models_description_has_the_words_of_version_1():
    """Servers and clients of several releases understand each other: `split` stays, whatever the code calls it."""
    assert CUT_INFO.model_dump_json(by_alias=True) == CUT_INFO_JSON
    assert ModelInfo.model_validate_json(CUT_INFO_JSON) == CUT_INFO


@pytest.mark.parametrize("kind", [ScoreRequest, GenerateRequest])
def test_a_request_for_tuned_parts_has_the_words_of_version_1(kind: type[ScoreRequest] | type[GenerateRequest]):
    """Byte for byte, so that equal requests have equal names in transcripts of several releases."""
    body = encode(kind(tuned_parts="a" * 64), {"starts": torch.tensor([1], dtype=torch.int32)})
    header = (
        f'{{"__metadata__":{{"blindtune": "1", "message": "{{\\"plugin\\":\\"{"a" * 64}\\"}}"}},'
        '"starts":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}'
    )
    assert body[8:].rstrip(b"\x01\x00").decode().rstrip() == header
    assert decode(body, kind)[0] == kind(tuned_parts="a" * 64)
    assert "plugin" not in encode(kind(), {}).decode(errors="ignore")
    assert PROBLEMS["unknown-plugin"] is UnknownTunedParts
