"""Bytes to messages and back: what is valid survives unchanged, what is not is refused before it costs anything."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from blindtune.errors import (
    BodyTooLarge,
    InvalidTensor,
    MalformedMessage,
    NonFiniteTensor,
    RequestError,
    UnsupportedVersion,
)
from blindtune.wire import (
    API_VERSION,
    AdapterUpload,
    BackwardRequest,
    ForwardRequest,
    ForwardResponse,
    Limits,
    LoraSpec,
    check_finite,
    check_tensor,
    decode,
    encode,
)
from blindtune.wire.codec import DTYPES

REQUEST = ForwardRequest(adapters=["a" * 64], pooling="mean", seed=3)
TENSORS = {
    "input_ids": torch.arange(12, dtype=torch.int32).reshape(3, 4),
    "lengths": torch.tensor([4, 2, 1], dtype=torch.int32),
}
KINDS = (ForwardRequest, BackwardRequest, AdapterUpload, ForwardResponse)


def pack(header: object, data: bytes = b"", *, claimed: int | None = None) -> bytes:
    """A body with this header (bytes, or anything that JSON can say) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if claimed is None else claimed).to_bytes(8, "little") + text + data


def unpack(body: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(body[:8], "little")
    return json.loads(body[8 : 8 + length]), body[8 + length :]


def metadata(message: Any = None, version: object = str(API_VERSION)) -> dict[str, Any]:
    text = REQUEST.model_dump_json() if message is None else message
    return {"blindtune": version, "message": text if isinstance(text, str) else json.dumps(text)}


def entry(dtype: object, shape: object, start: object, stop: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def one_tensor(described: object, data: bytes = bytes(16)) -> bytes:
    return pack({"__metadata__": metadata(), "x": described}, data)


class TestRoundTrip:
    def test_message_and_tensors_survive(self):
        message, tensors = decode(encode(REQUEST, TENSORS), ForwardRequest)
        assert message == REQUEST
        assert tensors.keys() == TENSORS.keys()
        assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
    def test_every_dtype_keeps_its_bits(self, dtype: torch.dtype):
        values = torch.tensor([[0, 1, 2], [3, 64, 127]]).to(dtype)
        _, tensors = decode(encode(REQUEST, {"x": values}), ForwardRequest)
        assert tensors["x"].dtype == dtype
        assert torch.equal(tensors["x"], values)

    def test_extreme_floats_keep_their_bits(self):
        values = torch.tensor([0.0, -0.0, 1e-45, 3.4e38, 1 / 3])
        _, tensors = decode(encode(REQUEST, {"x": values}), ForwardRequest)
        assert torch.equal(tensors["x"].view(torch.int32), values.view(torch.int32))

    def test_tensors_that_need_a_gradient_or_are_not_contiguous_can_be_sent(self):
        values = torch.arange(6.0).reshape(2, 3).requires_grad_().t()
        _, tensors = decode(encode(REQUEST, {"x": values}), ForwardRequest)
        assert torch.equal(tensors["x"], values.detach())
        assert not tensors["x"].requires_grad

    def test_a_message_without_tensors_is_complete(self):
        assert decode(encode(REQUEST), ForwardRequest) == (REQUEST, {})

    def test_empty_tensors_keep_their_shape(self):
        _, tensors = decode(encode(REQUEST, {"x": torch.empty(0, 7)}), ForwardRequest)
        assert tensors["x"].shape == (0, 7)

    def test_fields_at_their_defaults_take_no_bytes_and_come_back(self):
        short = encode(ForwardRequest(pooling="cls"))
        assert b"seed" not in short
        assert decode(short, ForwardRequest)[0].return_hidden is True

    @given(
        st.dictionaries(
            st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
            st.lists(st.integers(0, 4), max_size=4).map(tuple),
            max_size=5,
        ),
        st.sampled_from(sorted(DTYPES)),
        st.integers(0, 2**63 - 1),
    )
    def test_any_names_shapes_and_seeds_survive(self, shapes: dict[str, tuple[int, ...]], dtype: str, seed: int):
        tensors = {name: torch.randint(0, 99, shape).to(DTYPES[dtype]) for name, shape in shapes.items()}
        request = ForwardRequest(pooling="none", seed=seed)
        message, back = decode(encode(request, tensors), ForwardRequest)
        assert message == request
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


class TestEqualBytes:
    """Content addresses and retries rest on this."""

    def test_equal_input_gives_equal_bytes_every_time(self):
        assert len({encode(REQUEST, TENSORS) for _ in range(64)}) == 1

    def test_the_order_in_which_tensors_are_named_makes_no_difference(self):
        assert encode(REQUEST, dict(reversed(TENSORS.items()))) == encode(REQUEST, TENSORS)

    def test_another_process_gives_the_same_bytes(self):
        program = (
            "import sys, torch; from blindtune.wire import *;"
            "r = ForwardRequest(adapters=['a' * 64], pooling='mean', seed=3);"
            "t = {'input_ids': torch.arange(12, dtype=torch.int32).reshape(3, 4),"
            " 'lengths': torch.tensor([4, 2, 1], dtype=torch.int32)};"
            "sys.stdout.buffer.write(encode(r, t))"
        )
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
        assert result.stdout == encode(REQUEST, TENSORS)

    def test_data_begin_at_a_multiple_of_eight_bytes(self):
        for length in range(16):
            body = encode(REQUEST, {"x" * (length + 1): torch.zeros(1)})
            assert (8 + int.from_bytes(body[:8], "little")) % 8 == 0

    def test_one_changed_bit_changes_the_bytes(self):
        changed = {**TENSORS, "lengths": torch.tensor([4, 2, 2], dtype=torch.int32)}
        assert encode(REQUEST, changed) != encode(REQUEST, TENSORS)


class TestSizes:
    def test_a_body_over_the_limit_is_refused_with_both_numbers(self):
        body = encode(REQUEST, TENSORS)
        with pytest.raises(BodyTooLarge, match=rf"{len(body)} bytes.*limit is {len(body) - 1}"):
            decode(body, ForwardRequest, Limits(max_body_bytes=len(body) - 1))
        decode(body, ForwardRequest, Limits(max_body_bytes=len(body)))

    def test_a_header_over_the_limit_is_refused(self):
        body = encode(REQUEST, TENSORS)
        length = int.from_bytes(body[:8], "little")
        with pytest.raises(MalformedMessage, match=f"limit is {length - 1}"):
            decode(body, ForwardRequest, Limits(max_header_bytes=length - 1))
        decode(body, ForwardRequest, Limits(max_header_bytes=length))

    def test_too_many_tensors_are_refused(self):
        body = encode(REQUEST, {f"x{i}": torch.zeros(1) for i in range(5)})
        with pytest.raises(MalformedMessage, match=r"5 tensors.*limit is 4"):
            decode(body, ForwardRequest, Limits(max_tensors=4))
        decode(body, ForwardRequest, Limits(max_tensors=5))

    @pytest.mark.parametrize("claimed", [0, 1, 2**20 + 1, 2**32, 2**63, 2**64 - 1])
    def test_a_header_that_lies_about_its_length_is_refused(self, claimed: int):
        body = claimed.to_bytes(8, "little") + encode(REQUEST, TENSORS)[8:]
        with pytest.raises(MalformedMessage):
            decode(body, ForwardRequest)

    @pytest.mark.parametrize("size", range(8))
    def test_a_body_shorter_than_a_header_length_is_refused(self, size: int):
        with pytest.raises(MalformedMessage, match=f"{size} bytes"):
            decode(bytes(size), ForwardRequest)

    @pytest.mark.parametrize("shape", [[2**40], [2**24, 2**24], [2**47, 2**47, 2**47], [2**48 - 1] * 8])
    @pytest.mark.parametrize("stop", [16, 2**47])
    def test_a_huge_shape_on_a_tiny_body_is_refused_before_memory_is_set_aside(self, shape: list[int], stop: int):
        body = one_tensor(entry("F32", shape, 0, stop))
        tracemalloc.start()
        try:
            with pytest.raises(MalformedMessage):
                decode(body, ForwardRequest)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 2**20

    def test_an_empty_tensor_with_a_huge_side_holds_nothing(self):
        _, tensors = decode(one_tensor(entry("F32", [0, 2**40], 0, 0), b""), ForwardRequest)
        assert tensors["x"].nbytes == 0


class TestLayout:
    def test_the_helper_here_builds_valid_bodies(self):
        _, tensors = decode(one_tensor(entry("F32", [4], 0, 16)), ForwardRequest)
        assert torch.equal(tensors["x"], torch.zeros(4))

    @pytest.mark.parametrize(
        ("spans", "size"),
        [
            ([(0, 8), (4, 12)], 12),  # overlap
            ([(0, 8), (0, 8)], 8),  # the same bytes twice
            ([(0, 8), (12, 20)], 20),  # gap
            ([(4, 12)], 12),  # gap at the beginning
            ([(0, 8)], 12),  # bytes that no tensor claims
            ([(0, 8)], 4),  # a tensor beyond the end
        ],
    )
    def test_overlaps_gaps_and_leftovers_are_refused(self, spans: list[tuple[int, int]], size: int):
        entries = {f"x{i}": entry("F32", [2], start, stop) for i, (start, stop) in enumerate(spans)}
        with pytest.raises(MalformedMessage, match=r"overlap or leave gaps|The header describes"):
            decode(pack({"__metadata__": metadata(), **entries}, bytes(size)), ForwardRequest)

    @pytest.mark.parametrize(
        "described",
        [
            entry("F32", [4], 16, 0),
            entry("F32", [4], -16, 0),
            entry("F32", [5], 0, 16),
            entry("F32", [-4], 0, 16),
            entry("F32", [4.0], 0, 16),
            entry("F32", [True, 4], 0, 16),
            entry("F32", ["4"], 0, 16),
            entry("F32", [[4]], 0, 16),
            entry("F32", [1] * 9, 0, 4),
            entry("F32", 4, 0, 16),
            entry("F32", None, 0, 16),
            entry("F32", {"4": 4}, 0, 16),
            entry("F32", [4], None, 16),
            entry("F32", [4], 0.0, 16),
            entry("F32", [10**30], 0, 16),
            {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]},
            {"dtype": "F32", "shape": [4], "data_offsets": [16]},
            {"dtype": "F32", "shape": [4]},
            {"dtype": "F32", "data_offsets": [0, 16]},
            {},
            [],
            None,
            "F32",
            7,
        ],
        ids=repr,
    )
    def test_an_entry_that_makes_no_sense_is_refused(self, described: object):
        with pytest.raises((MalformedMessage, InvalidTensor)):
            decode(one_tensor(described), ForwardRequest)

    @pytest.mark.parametrize("dtype", ["C64", "BOOL", "F8_E4M3", "f32", "", "torch.float32", None, 7, [], {}, ["F32"]])
    def test_an_unknown_dtype_is_refused_by_name(self, dtype: object):
        with pytest.raises(InvalidTensor, match=r"'x' has dtype .*") as caught:
            decode(one_tensor(entry(dtype, [2], 0, 16)), ForwardRequest)
        assert repr(dtype) in caught.value.message
        assert "F32" in caught.value.remedy

    @pytest.mark.parametrize(
        "header",
        [
            b"",
            b"x",
            b"[]",
            b"null",
            b"17",
            b'"text"',
            b"{",
            b'{"__metadata__": {}',
            b'{"x": NaN}',
            b"\xff\xfe{}",
            '{"__metadata__": null}'.encode("utf-16"),
            b'{"\\ud800": {}}',
            b"9" * 5000,
        ],
        ids=repr,
    )
    def test_a_header_that_is_no_json_object_is_refused(self, header: bytes):
        with pytest.raises((MalformedMessage, InvalidTensor)):
            decode(pack(header), ForwardRequest)

    @pytest.mark.parametrize("opening", [b"[", b'{"a":'])
    def test_deeply_nested_json_is_refused(self, opening: bytes):
        with pytest.raises(MalformedMessage):
            decode(pack(opening * 100_000), ForwardRequest)
        with pytest.raises(MalformedMessage):
            decode(pack({"__metadata__": metadata((opening * 100_000).decode())}), ForwardRequest)

    @pytest.mark.parametrize(
        "value", [None, [], "text", {"blindtune": "1"}, {"message": "{}", "blindtune": "1", "x": 1}]
    )
    def test_metadata_of_another_form_are_refused(self, value: object):
        with pytest.raises(MalformedMessage):
            decode(pack({"__metadata__": value}), ForwardRequest)

    def test_missing_metadata_are_refused(self):
        with pytest.raises(MalformedMessage, match="metadata"):
            decode(pack({"x": entry("F32", [4], 0, 16)}, bytes(16)), ForwardRequest)


class TestMessages:
    @pytest.mark.parametrize("version", ["2", "0", "1.0", "", 1, None, [1]])
    def test_another_version_is_refused_by_number(self, version: object):
        with pytest.raises(UnsupportedVersion) as caught:
            decode(pack({"__metadata__": metadata(version=version)}), ForwardRequest)
        assert repr(version) in caught.value.message
        assert str(API_VERSION) in caught.value.message

    @pytest.mark.parametrize("kind", [BackwardRequest, AdapterUpload, ForwardResponse])
    def test_a_message_of_another_kind_is_refused(self, kind: type[Any]):
        with pytest.raises(MalformedMessage, match=kind.__name__):
            decode(encode(ForwardRequest(pooling="mean")), kind)

    def test_an_unknown_field_is_refused_by_name(self):
        body = pack({"__metadata__": metadata({"pooling": "mean", "poling": "cls"})})
        with pytest.raises(MalformedMessage, match="poling"):
            decode(body, ForwardRequest)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("pooling", "median"),
            ("pooling", None),
            ("adapters", ["A" * 64]),
            ("adapters", ["a" * 63]),
            ("adapters", "a" * 64),
            ("adapters", ["a" * 64] * 4097),
            ("seed", -1),
            ("seed", 2**63),
            ("seed", 1.5),
            ("seed", "one"),
            ("return_hidden", 7),
        ],
    )
    def test_a_field_outside_its_range_is_refused_by_name(self, field: str, value: object):
        with pytest.raises(MalformedMessage, match=field):
            decode(pack({"__metadata__": metadata({"pooling": "mean", field: value})}), ForwardRequest)

    @pytest.mark.parametrize(
        "changes",
        [
            {"rank": 0},
            {"rank": -1},
            {"rank": 2.5},
            {"modules": []},
            {"modules": [""]},
            {"modules": ["x" * 257]},
            {"scaling": -1.0},
            {"scaling": "NaN"},
            {"dropout": 1.0},
            {"dropout": -0.1},
            {"kind": "dora"},
            {"bias": "all"},
        ],
        ids=repr,
    )
    def test_an_adapter_that_makes_no_sense_is_refused(self, changes: dict[str, object]):
        spec = {"modules": ["layer.0"], "rank": 2, "scaling": 1.0, **changes}
        body = pack({"__metadata__": metadata({"model": "m", "spec": spec})})
        with pytest.raises(MalformedMessage, match=next(iter(changes))):
            decode(body, AdapterUpload)

    @pytest.mark.parametrize("scaling", ["NaN", "Infinity", "1e999"])
    def test_a_scaling_that_is_not_finite_is_refused(self, scaling: str):
        text = '{"model": "m", "spec": {"modules": ["layer.0"], "rank": 2, "scaling": 7}}'.replace("7", scaling)
        with pytest.raises(MalformedMessage):
            decode(pack({"__metadata__": metadata(text)}), AdapterUpload)

    @pytest.mark.parametrize("text", ["", "{}", "null", "[]", "\ud800", "\x00", '{"pooling": "mean"', "9" * 5000])
    def test_message_text_that_is_no_message_is_refused(self, text: str):
        with pytest.raises(MalformedMessage):
            decode(pack({"__metadata__": metadata(text)}), ForwardRequest)


VALID = encode(REQUEST, TENSORS)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ENTRIES = JSON | st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "C64", "?"]) | JSON,
        "shape": st.lists(st.integers(-1, 2**50), max_size=9) | JSON,
        "data_offsets": st.lists(st.integers(-8, 64), min_size=1, max_size=3) | JSON,
    }
)


def decodes_or_refuses(body: bytes) -> None:
    """Whatever comes in: a message of the wanted kind, or a refusal that becomes a problem document."""
    for kind in KINDS:
        try:
            message, tensors = decode(body, kind)
        except RequestError as error:
            json.dumps(error.to_problem(), ensure_ascii=False).encode()
        else:
            assert isinstance(message, kind)
            assert sum(tensor.nbytes for tensor in tensors.values()) <= len(body)


class TestAnyBytes:
    @given(st.binary(max_size=200))
    def test_random_bytes_are_refused(self, body: bytes):
        decodes_or_refuses(body)

    @given(st.integers(0, len(VALID) - 1))
    def test_a_truncated_body_is_refused(self, size: int):
        with pytest.raises(MalformedMessage):
            decode(VALID[:size], ForwardRequest)

    @given(st.binary(min_size=1, max_size=9))
    def test_a_body_with_bytes_after_its_end_is_refused(self, tail: bytes):
        with pytest.raises(MalformedMessage):
            decode(VALID + tail, ForwardRequest)

    @settings(max_examples=400)
    @given(st.integers(0, 8 + int.from_bytes(VALID[:8], "little") - 1), st.integers(0, 7))
    def test_a_flipped_bit_in_the_header_is_refused_or_harmless(self, position: int, bit: int):
        flipped = bytearray(VALID)
        flipped[position] ^= 1 << bit
        decodes_or_refuses(bytes(flipped))

    @settings(max_examples=200)
    @given(JSON, st.binary(max_size=32))
    def test_any_json_as_header_is_refused(self, header: object, data: bytes):
        decodes_or_refuses(pack(header, data))

    @settings(max_examples=300)
    @given(st.dictionaries(st.text(max_size=6), ENTRIES, max_size=3), st.binary(max_size=64))
    @example({"x": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}, bytes(4))
    @example({"x": {"dtype": {}, "shape": [1], "data_offsets": [0, 4]}}, bytes(4))
    def test_any_tensor_entries_are_refused_or_read(self, entries: dict[str, object], data: bytes):
        decodes_or_refuses(pack({**entries, "__metadata__": metadata()}, data))

    @settings(max_examples=300)
    @given(JSON | st.text(max_size=20))
    def test_any_json_as_message_is_refused_or_read(self, message: object):
        decodes_or_refuses(pack({"__metadata__": metadata(message if message is not None else {})}))

    @settings(max_examples=200)
    @given(
        st.dictionaries(
            st.sampled_from(["adapters", "pooling", "seed", "return_hidden", "model", "spec", "fingerprint", "x"]),
            JSON | st.sampled_from(["mean", "a" * 64, ["a" * 64]]),
        )
    )
    def test_any_field_values_are_refused_or_read(self, fields: dict[str, object]):
        decodes_or_refuses(pack({"__metadata__": metadata(fields)}))


class TestCheckTensor:
    GIVEN: Mapping[str, Tensor] = {"x": torch.ones(2, 3)}

    def test_a_fitting_tensor_is_handed_on(self):
        assert check_tensor(self.GIVEN, "x", (2, None), torch.float32) is self.GIVEN["x"]

    def test_a_missing_tensor_is_named_with_the_shape_it_should_have(self):
        with pytest.raises(InvalidTensor, match="'y' is missing") as caught:
            check_tensor(self.GIVEN, "y", (2, None), torch.float32)
        assert "(2, any)" in caught.value.remedy

    @pytest.mark.parametrize("shape", [(3, 2), (2,), (2, 3, 1), (), (None,), (2, 4), (None, None, None)])
    def test_a_wrong_shape_is_named(self, shape: tuple[int | None, ...]):
        with pytest.raises(InvalidTensor, match=r"'x' has shape \(2, 3\)"):
            check_tensor(self.GIVEN, "x", shape, torch.float32)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
    def test_a_wrong_dtype_is_named(self, dtype: torch.dtype):
        with pytest.raises(InvalidTensor, match=r"'x' has dtype torch.float32") as caught:
            check_tensor(self.GIVEN, "x", (2, 3), dtype)
        assert str(dtype) in caught.value.remedy

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_a_value_that_is_not_finite_is_counted(self, bad: float, dtype: torch.dtype):
        values = torch.ones(2, 3, dtype=dtype)
        values[1, 1:] = bad
        with pytest.raises(NonFiniteTensor, match=r"'x' holds 2 values"):
            check_tensor({"x": values}, "x", (2, 3), dtype)

    def test_integers_and_the_largest_floats_are_finite(self):
        check_finite("x", torch.tensor([2**31 - 1], dtype=torch.int32))
        check_finite("x", torch.tensor([torch.finfo(torch.float32).max]))


def test_a_large_message_survives_at_the_default_limits():
    spec = LoraSpec(modules=[f"encoder.layer.{i}.attention.self.query" for i in range(400)], rank=8, scaling=2.0)
    upload = AdapterUpload(model="minilm", spec=spec)
    message, tensors = decode(encode(upload, {"weights": torch.ones(200_000)}), AdapterUpload)
    assert message == upload
    assert tensors["weights"].sum() == 200_000
