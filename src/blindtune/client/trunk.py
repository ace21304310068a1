"""A split model's middle, as a function that runs on the provider's server, and the ends that the client may hold."""

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
from blindtune.models.emulator import StoredEmulator
from blindtune.models.manifest import Manifest
from blindtune.models.split import PartName, build_part, config_from_json, pack, unpack
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
class Sent:
    """A forward call: its tensors, and the SHA-256 of its body, by which the backward call names it."""

    tensors: dict[str, Tensor]
    sha256: str


class RemoteTrunk:
    """s_B = trunk(s_A) on a server; differentiable, so that `backward` asks the server for the gradient.

    Both directions are quantized. The gradient passes through the rounding of s_A as if it weren't there
    (straight-through); gradients are rounded at random, with the right mean.

    Args:
        operator: a server that hosts the model with `--split`.
        up, down: codecs of what is sent and of what comes back.
    Raises:
        UnknownPart: the model isn't split there.
        ConfigError: a codec that the server doesn't offer.
    """

    def __init__(self, operator: Operator, *, up: Codec = "int8", down: Codec = "int8") -> None:
        if operator.info.split is None:
            raise UnknownPart(
                f"{operator.info.name!r} is not split at {operator.transport.url}.",
                remedy="The provider has to serve it with --split.",
            )
        for codec in (up, down):
            if codec not in operator.info.split.codecs:
                raise ConfigError(
                    f"{operator.transport.url} doesn't offer the codec {codec!r}.",
                    remedy=f"Use one of: {', '.join(operator.info.split.codecs)}.",
                )
        self.operator = operator
        self.up: Codec = up
        self.down: Codec = down
        self.traffic: Counter[str] = Counter()
        """Bytes of HTTP messages so far by kind: `s_A up`, `s_B down`, `g_B up`, `g_A down`."""
        self.last_forward: str | None = None
        """SHA-256 of the last forward call's body: the name under which a recording server knows it."""

    def __call__(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """`(B, L, d)` from `(B, L, d)`; only the `lengths (B,)` first tokens of each example travel."""
        packed = pack(hidden, lengths)
        if torch.is_grad_enabled() and packed.requires_grad:
            result = cast(Tensor, _RemoteBlocks.apply(self, packed, lengths))
        else:
            result, _ = self.forward(packed, lengths)
        return unpack(result, lengths)

    def forward(self, packed: Tensor, lengths: Tensor, *, retain: bool = False) -> tuple[Tensor, Sent]:
        """s_B `[N, d]` for s_A `[N, d]`, float32, without gradient; and what was sent for it.

        Args:
            retain: whether a backward call will follow.
        """
        tensors = {**quantize("hidden", packed.cpu(), self.up), "lengths": lengths.to("cpu", torch.int32)}
        body = encode(TrunkRequest(up=self.up, down=self.down, retain=retain), tensors)
        answer = self._post("forward", body, "s_A up", "s_B down")
        sent = Sent(tensors, hashlib.sha256(body).hexdigest())
        self.last_forward = sent.sha256
        return self._answer("hidden", answer, packed), sent

    def backward(self, sent: Sent, cotangents: Tensor) -> Tensor:
        """g_A `[N, d]` for the cotangents g_B `[N, d]` of s_B.

        s_A is not sent again, unless the server has forgotten it.
        """
        generator = torch.Generator().manual_seed(int(sent.sha256[:14], 16))  # a repeated step rounds alike
        rounded = quantize("cotangents", cotangents.cpu(), self.up, generator=generator)
        request = TrunkRequest(up=self.up, down=self.down, forward=sent.sha256)
        try:
            body = encode(request, {"lengths": sent.tensors["lengths"], **rounded})
            answer = self._post("backward", body, "g_B up", "g_A down")
        except GraphLost:
            answer = self._post("backward", encode(request, {**sent.tensors, **rounded}), "g_B up", "g_A down")
        return self._answer("gradients", answer, cotangents)

    def _post(self, direction: str, body: bytes, up: str, down: str) -> bytes:
        traffic = self.operator.transport.traffic
        sent, received = traffic.sent, traffic.received
        try:
            return self.operator.transport.post(f"{self.operator.path}/trunk/{direction}", body)
        finally:
            self.traffic[up] += traffic.sent - sent
            self.traffic[down] += traffic.received - received

    def _answer(self, name: str, body: bytes, asked: Tensor) -> Tensor:
        """The tensor that came back, of the shape and on the device of what was sent."""
        message, tensors = decode(body, TrunkResponse, ANSWER_LIMITS)
        self.operator.check_fingerprint(message.fingerprint)
        result = dequantize(name, tensors, self.down, asked.shape[1])
        return check_tensor({name: result}, name, tuple(asked.shape), torch.float32).to(asked.device)


class _RemoteBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trunk: RemoteTrunk, packed: Tensor, lengths: Tensor) -> Tensor:
        ctx.trunk = trunk
        result, ctx.sent = trunk.forward(packed, lengths, retain=True)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, ctx.trunk.backward(ctx.sent, grad_outputs[0]), None


def fetch_part(operator: Operator, name: PartName) -> Part:
    """Bottom or top of a split model, frozen, in the dtype that the provider hosts it in.

    Raises:
        UnknownPart: the server doesn't offer it.
        CheckpointError, ConfigError: an answer that doesn't describe a part.
    """
    message, tensors = decode(operator.transport.fetch(f"{operator.path}/parts/{name}"), PartFile, PART_LIMITS)
    operator.check_fingerprint(message.fingerprint)
    return build_part(config_from_json(message.config), name, Cut(message.bottom, message.top), tensors)


def fetch_emulator(operator: Operator, trusted_key: str | None = None) -> tuple[Part, Manifest]:
    """The emulator of a split model's trunk, frozen, and its manifest: to be called as the trunk, `(B, L, d)` and
    lengths `(B,)` to `(B, L, d)`. Nothing of it is used before its signature, hash, source and cut have been checked.

    Args:
        trusted_key: the provider's public key, 64 hexadecimal digits. Without it, any key may have signed.
    Raises:
        UnknownPart: the server doesn't offer one.
        OperatorsDiffer: the server hosts other weights than at the start.
        EmulatorError: it was changed since it was signed, is of another model or cut, or signed with an unknown key.
    """
    message, tensors = decode(operator.transport.fetch(f"{operator.path}/parts/emulator"), PartFile, PART_LIMITS)
    operator.check_fingerprint(message.fingerprint)
    emulator = StoredEmulator.of(message.manifest or "", tensors)
    split = operator.info.split  # what the ends are cut by
    cut = Cut(message.bottom, message.top) if split is None else Cut(split.bottom, split.top)
    emulator.verify(fingerprint=operator.info.fingerprint, cut=cut, trusted_key=trusted_key)
    return emulator.part(), emulator.manifest
