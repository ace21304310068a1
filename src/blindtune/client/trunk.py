"""A cut model's trunk on the provider's server, as a differentiable function, and downloads of its other parts."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from blindtune.client.operators import ANSWER_LIMITS, Operator
from blindtune.errors import ConfigError, GraphLost, UnknownPart
from blindtune.models import Cut, Part
from blindtune.models.cut.emulator import StoredEmulator
from blindtune.models.cut.manifest import Manifest
from blindtune.models.cut.parts import PartName, build_part, config_from_json, pack, unpack
from blindtune.wire import (
    Codec,
    PartFile,
    TrunkRequest,
    TrunkResponse,
    check_tensor,
    decode,
    dequantize,
    encode,
    quantize,
)

PART_LIMITS = ANSWER_LIMITS.model_copy(update={"max_body_bytes": 2**40, "max_tensors": 100_000})


@dataclass(frozen=True)
class TrunkCall:
    """A forward request to a trunk that a backward request can refer to."""

    tensors: dict[str, Tensor]
    """The tensors of the forward request."""
    sha256: str
    """SHA-256 of its body, by which the backward request names it."""


class RemoteTrunk:
    """The function s_B = trunk(s_A), computed on a server. It is differentiable: the server also computes the gradient.

    Tensors in both directions are quantized. The gradient ignores the rounding of s_A (straight-through estimator).
    Gradients are rounded stochastically, without bias.

    Args:
        operator: a server that hosts the model with `--cut`.
        up: codec of the tensors that are sent.
        down: codec of the tensors that are received.
    Raises:
        UnknownPart: the server hosts the model without a cut.
        ConfigError: the server doesn't offer a codec.
    """

    def __init__(self, operator: Operator, *, up: Codec = "int8", down: Codec = "int8") -> None:
        if operator.info.cut is None:
            raise UnknownPart(
                f"{operator.info.name!r} is not cut at {operator.transport.url}.",
                remedy="The provider has to serve it with --cut.",
            )
        for codec in (up, down):
            if codec not in operator.info.cut.codecs:
                raise ConfigError(
                    f"{operator.transport.url} doesn't offer the codec {codec!r}.",
                    remedy=f"Use one of: {', '.join(operator.info.cut.codecs)}.",
                )
        self.operator = operator
        self.up: Codec = up
        self.down: Codec = down
        self.traffic: Counter[str] = Counter()
        """Bytes of HTTP messages so far by kind: `s_A up`, `s_B down`, `g_B up`, `g_A down`."""
        self.last_forward: str | None = None
        """SHA-256 of the last forward request's body, which identifies it in a server's transcript."""

    def __call__(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Returns s_B `(B, L, d)` for s_A `(B, L, d)`.

        Only the first `lengths (B,)` tokens of each example are sent.
        """
        packed = pack(hidden, lengths)
        if torch.is_grad_enabled() and packed.requires_grad:
            result = cast(Tensor, _RemoteBlocks.apply(self, packed, lengths))
        else:
            result, _ = self.forward(packed, lengths)
        return unpack(result, lengths)

    def forward(self, packed: Tensor, lengths: Tensor, *, retain: bool = False) -> tuple[Tensor, TrunkCall]:
        """Computes s_B `[N, d]` for s_A `[N, d]`, float32, without gradient.

        Args:
            packed: s_A, `[N, d]`.
            lengths: `(B,)`, with the sum N.
            retain: whether the server keeps the autograd graph for a following `backward`.
        Returns:
            s_B, and the request, to be given to `backward`.
        """
        tensors = {**quantize("hidden", packed.cpu(), self.up), "lengths": lengths.to("cpu", torch.int32)}
        body = encode(TrunkRequest(up=self.up, down=self.down, retain=retain), tensors)
        answer = self._post("forward", body, "s_A up", "s_B down")
        call = TrunkCall(tensors, hashlib.sha256(body).hexdigest())
        self.last_forward = call.sha256
        return self._decode("hidden", answer, packed), call

    def backward(self, call: TrunkCall, cotangents: Tensor) -> Tensor:
        """Computes the gradient g_A `[N, d]` for the cotangents g_B `[N, d]` of s_B.

        s_A is sent again only if the server no longer has the graph.

        Args:
            call: the forward request, from `forward`.
        """
        generator = torch.Generator().manual_seed(int(call.sha256[:14], 16))  # a repeated step gives the same rounding
        quantized = quantize("cotangents", cotangents.cpu(), self.up, generator=generator)
        request = TrunkRequest(up=self.up, down=self.down, forward=call.sha256)
        try:
            body = encode(request, {"lengths": call.tensors["lengths"], **quantized})
            answer = self._post("backward", body, "g_B up", "g_A down")
        except GraphLost:
            answer = self._post("backward", encode(request, {**call.tensors, **quantized}), "g_B up", "g_A down")
        return self._decode("gradients", answer, cotangents)

    def _post(self, direction: str, body: bytes, up: str, down: str) -> bytes:
        """Posts a request. Adds its bytes to the traffic of the kinds `up` and `down`, also if it fails."""
        traffic = self.operator.transport.traffic
        sent, received = traffic.sent, traffic.received
        try:
            return self.operator.transport.post(f"{self.operator.path}/trunk/{direction}", body)
        finally:
            self.traffic[up] += traffic.sent - sent
            self.traffic[down] += traffic.received - received

    def _decode(self, name: str, body: bytes, like: Tensor) -> Tensor:
        """Returns the tensor of a response, which must have the shape of `like`, on the device of `like`."""
        message, tensors = decode(body, TrunkResponse, ANSWER_LIMITS)
        self.operator.check_fingerprint(message.fingerprint)
        result = dequantize(name, tensors, self.down, like.shape[1])
        return check_tensor({name: result}, name, tuple(like.shape), torch.float32).to(like.device)


class _RemoteBlocks(torch.autograd.Function):
    """The trunk's forward and backward pass on the server, for autograd."""

    @staticmethod
    def forward(ctx: Any, trunk: RemoteTrunk, packed: Tensor, lengths: Tensor) -> Tensor:
        ctx.trunk = trunk
        result, ctx.call = trunk.forward(packed, lengths, retain=True)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, ctx.trunk.backward(ctx.call, grad_outputs[0]), None


def fetch_part(operator: Operator, name: PartName) -> Part:
    """Downloads the bottom or the top of a cut model, frozen, in the dtype in which the provider hosts it.

    Raises:
        UnknownPart: the server doesn't offer the part.
        CheckpointError, ConfigError: the response doesn't describe a valid part.
    """
    message, tensors = decode(operator.transport.fetch(f"{operator.path}/parts/{name}"), PartFile, PART_LIMITS)
    operator.check_fingerprint(message.fingerprint)
    return build_part(config_from_json(message.config), name, Cut(message.bottom, message.top), tensors)


def fetch_emulator(operator: Operator, trusted_key: str | None = None) -> tuple[Part, Manifest]:
    """Downloads the emulator of a cut model's trunk. Its signature, hash, source and cut are checked before use.

    Args:
        trusted_key: the provider's public key, 64 hexadecimal digits. Without it, a signature by any key is accepted.
    Returns:
        The frozen emulator, with the trunk's interface (`(B, L, d)` and lengths `(B,)` to `(B, L, d)`), and its
        manifest.
    Raises:
        UnknownPart: the server doesn't offer an emulator.
        OperatorsDiffer: the server hosts other weights than at the start.
        EmulatorError: the emulator was changed after it was signed, was made from another model or for another cut, or
            isn't signed with the trusted key.
    """
    message, tensors = decode(operator.transport.fetch(f"{operator.path}/parts/emulator"), PartFile, PART_LIMITS)
    operator.check_fingerprint(message.fingerprint)
    emulator = StoredEmulator.of(message.manifest or "", tensors)
    info = operator.info.cut  # the cut of the hosted bottom and top
    cut = Cut(message.bottom, message.top) if info is None else Cut(info.bottom, info.top)
    emulator.verify(fingerprint=operator.info.fingerprint, cut=cut, trusted_key=trusted_key)
    return emulator.part(), emulator.manifest
