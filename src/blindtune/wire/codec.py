"""Encodes messages and tensors to bytes and back: one safetensors buffer with the JSON message in its metadata.

    8 bytes    header length N, little endian
    N bytes    JSON: {"__metadata__": {"blindtune": "1", "message": "<JSON>"}, "<tensor>": {dtype, shape, offsets}, ...}
    the rest   tensor data, in the header's order, without gaps

`decode` parses the header itself and checks every length and offset in it against the body before it allocates
anything. Only then does the safetensors library build tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from pydantic import ValidationError
from safetensors.torch import load, save
from torch import Tensor

from blindtune.errors import BodyTooLarge, InvalidTensor, MalformedMessage, NonFiniteTensor, UnsupportedVersion
from blindtune.wire.limits import Limits
from blindtune.wire.schema import API_VERSION, Message

M = TypeVar("M", bound=Message)

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
}
_VERSION_KEY, _MESSAGE_KEY = "blindtune", "message"


def encode(message: Message, tensors: Mapping[str, Tensor] | None = None) -> bytes:
    """Returns one request or response body. Copies tensors to the CPU. Equal arguments give equal bytes."""
    written = message.model_dump_json(exclude_defaults=True, by_alias=True)
    metadata = {_VERSION_KEY: str(API_VERSION), _MESSAGE_KEY: written}
    plain = save({name: tensor.detach().cpu().contiguous() for name, tensor in (tensors or {}).items()})
    end = 8 + int.from_bytes(plain[:8], "little")
    # the metadata is inserted here because the library writes its keys in a random order
    entries = plain[8:end].strip()[1:]
    header = b'{"__metadata__":' + json.dumps(metadata).encode() + (b"" if entries == b"}" else b",") + entries
    header += b" " * (-len(header) % 8)  # keeps the tensor data aligned to 8 bytes
    return b"".join((len(header).to_bytes(8, "little"), header, memoryview(plain)[end:]))


def decode(body: bytes, kind: type[M], limits: Limits | None = None) -> tuple[M, dict[str, Tensor]]:
    """Returns the message and the tensors of a body.

    Raises:
        BodyTooLarge: the body has more than `limits.max_body_bytes`.
        MalformedMessage: the header's lengths, offsets or JSON are wrong, or the message is of another kind.
        UnsupportedVersion: the message has another API version.
        InvalidTensor: a dtype isn't in `DTYPES`.
    """
    limits = limits or Limits()
    if len(body) > limits.max_body_bytes:
        raise BodyTooLarge(
            f"The body has {len(body)} bytes, the limit is {limits.max_body_bytes}.", remedy="Send a smaller batch."
        )
    header = _read_header(body, limits)
    metadata = _as_object(header.pop("__metadata__", None), "the metadata")
    version = metadata.get(_VERSION_KEY)
    if version != str(API_VERSION):
        raise UnsupportedVersion(
            f"The message has API version {version!r}; this version of blindtune uses {API_VERSION}.",
            remedy="Use matching versions of blindtune.",
        )
    raw = metadata.get(_MESSAGE_KEY)
    if not isinstance(raw, str):
        raise _malformed("The metadata hold no JSON message.")
    try:
        message = kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise MalformedMessage(
            f"The message is no valid {kind.__name__}: {where}: {first['msg']}.", remedy="Check the field's value."
        ) from None
    try:
        return message, load(body)
    except Exception as error:  # the library found an error that `_read_header` should have found
        raise _malformed(f"The tensors can't be read: {error}.") from None


def check_tensor(tensors: Mapping[str, Tensor], name: str, shape: tuple[int | None, ...], dtype: torch.dtype) -> Tensor:
    """Returns the named tensor after checking its shape (`None` matches any size), its dtype and that it is finite.

    Raises:
        InvalidTensor: the tensor is missing or has another shape or dtype.
        NonFiniteTensor: it holds NaN or infinity.
    """
    tensor = tensors.get(name)
    if tensor is None:
        raise InvalidTensor(f"The tensor {name!r} is missing.", remedy=f"Send it with shape {_shape(shape)}.")
    if tensor.dtype != dtype:
        raise InvalidTensor(f"The tensor {name!r} has dtype {tensor.dtype}.", remedy=f"Send it as {dtype}.")
    fits = len(shape) == tensor.ndim and all(w is None or w == h for w, h in zip(shape, tensor.shape, strict=True))
    if not fits:
        raise InvalidTensor(
            f"The tensor {name!r} has shape {tuple(tensor.shape)}.", remedy=f"Send it with shape {_shape(shape)}."
        )
    check_finite(name, tensor)
    return tensor


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises `NonFiniteTensor` if a value of a floating-point tensor is NaN or infinite."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteTensor(
            f"The tensor {name!r} holds {count} values that are NaN or infinite.",
            remedy="Lower the learning rate or clip gradients; nothing was changed on the server.",
        )


def _read_header(body: bytes, limits: Limits) -> dict[str, Any]:
    """Returns the safetensors header after checking every length and offset in it against the body."""
    if len(body) < 8:
        raise _malformed(f"The body has {len(body)} bytes, fewer than the 8 of a header length.")
    length = int.from_bytes(body[:8], "little")
    if length > limits.max_header_bytes or length > len(body) - 8:
        raise _malformed(
            f"The header claims {length} bytes; the body has {len(body) - 8} left and the limit is "
            f"{limits.max_header_bytes}."
        )
    try:
        header = _as_object(json.loads(body[8 : 8 + length]), "the header")
    except (ValueError, RecursionError):
        raise _malformed("The header is not JSON.") from None
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if len(entries) > limits.max_tensors:
        raise _malformed(f"The message has {len(entries)} tensors, the limit is {limits.max_tensors}.")
    spans: list[tuple[int, int]] = []
    for name, raw in entries.items():
        spans.append(_check_entry(name, _as_object(raw, f"the entry of {name!r}")))
    position = 0
    for start, stop in sorted(spans):
        if start != position:
            raise _malformed("The tensors overlap or leave gaps in the buffer.")
        position = stop
    if position != len(body) - 8 - length:
        raise _malformed(f"The header describes {position} bytes of tensors, the body holds {len(body) - 8 - length}.")
    return header


def _check_entry(name: str, entry: dict[str, Any]) -> tuple[int, int]:
    """Checks a tensor's entry in the header. Returns the first and last offset of its data."""
    dtype, shape, offsets = entry.get("dtype"), _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InvalidTensor(f"The tensor {name!r} has dtype {dtype!r}.", remedy=f"Use one of {', '.join(DTYPES)}.")
    if shape is None or offsets is None or len(offsets) != 2 or len(shape) > 8:
        raise _malformed(f"The entry of {name!r} has no valid shape and offsets.")
    start, stop = offsets
    if stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise _malformed(f"The tensor {name!r} claims shape {tuple(shape)} of {dtype} but spans {stop - start} bytes.")
    return start, stop


def _sizes(value: object) -> list[int] | None:
    """Returns a list of sizes below 2^48, or None if `value` is anything else."""
    if not isinstance(value, list):
        return None
    sizes = [item for item in cast("list[object]", value) if type(item) is int and 0 <= item < 2**48]
    return sizes if len(sizes) == len(cast("list[object]", value)) else None


def _as_object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _malformed(f"There is no JSON object for {what}.")
    return cast("dict[str, Any]", value)


def _malformed(message: str) -> MalformedMessage:
    return MalformedMessage(message, remedy="Encode with blindtune.wire.encode.")


def _shape(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
