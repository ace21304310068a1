"""The routes for hidden states of whole models, and for gradients of their adapters.

B: examples; L: tokens; n: adapters; m: cotangents; k: states; d: hidden size; P: weights of an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from fastapi import APIRouter, Request, Response
from torch import Tensor

from blindtune.errors import InvalidTensor
from blindtune.lattice import Lattice, expand_noise
from blindtune.server.engine import Call, Engine
from blindtune.server.host import Host
from blindtune.server.limits import check_answer, check_cotangents, check_directions
from blindtune.server.recorder import Recorder
from blindtune.server.routes.batch import read_batch
from blindtune.server.routes.handler import Handler, Received, answer_post, tensors_response
from blindtune.wire import (
    BackwardRequest,
    BackwardResponse,
    Codec,
    ForwardRequest,
    ForwardResponse,
    Limits,
    NoiseShare,
    check_finite,
    check_tensor,
    decode,
    encode_hidden,
    flat,
    layer_axes,
)

router = APIRouter()


@router.post("/v1/models/{model:path}/forward")
async def forward(model: str, request: Request) -> Response:
    """Computes the hidden states of a batch under n adapters."""
    return await answer_post(request, model, Forward)


@router.post("/v1/models/{model:path}/backward")
async def backward(model: str, request: Request) -> Response:
    """Computes the gradients of every adapter for every cotangent."""
    return await answer_post(request, model, Backward)


@dataclass(frozen=True)
class ForwardPass:
    """A request for a forward pass that has passed all checks."""

    engine: Engine
    call: Call
    codec: Codec
    retain: bool
    return_hidden: bool


class Forward(Handler[ForwardPass, Tensor | None]):
    """Computes hidden states or tangents `(n, B, k · d)` or `(n, B, L, k · d)`, float32; None if none are returned."""

    def decode(self, received: Received) -> ForwardPass:
        request, tensors = decode(received.body, ForwardRequest, self.host.settings.limits)
        call = _call(self.host, received, request, tensors)
        engine = self.host.engine(received.name)
        check_hidden(call, engine.backbone.hidden_size, self.host.settings.limits)
        return ForwardPass(engine, call, request.codec, request.retain, request.return_hidden)

    def run(self, work: ForwardPass) -> Tensor | None:
        hidden = self.host.with_room(lambda: work.engine.forward(work.call, retain=work.retain))
        check_finite("hidden", hidden)
        self.host.metrics.tokens.labels("forward").inc(work.call.tokens.input_ids.numel() * work.call.copies)
        return hidden if work.return_hidden else None

    def record(self, recorder: Recorder, work: ForwardPass, result: Tensor | None) -> None:
        recorder.forward(work.engine.name, work.call, result)

    def encode(self, work: ForwardPass, result: Tensor | None) -> Response:
        message = ForwardResponse(fingerprint=work.engine.backbone.fingerprint)
        if result is None:
            return tensors_response(message, {})
        return tensors_response(message, encode_hidden(result, work.call.tokens.lengths, work.call.readout, work.codec))


@dataclass(frozen=True)
class BackwardPass:
    """A request for a backward pass that has passed all checks. Cotangents are float32.

    Attributes:
        cotangents: `(m, n, B, k · d)` or `(m, n, B, L, k · d)`.
    """

    engine: Engine
    call: Call
    cotangents: Tensor


class Backward(Handler[BackwardPass, tuple[Tensor, bool]]):
    """Computes gradients `(m, n, P)`, and returns whether the graph of the forward pass was still in the cache."""

    def decode(self, received: Received) -> BackwardPass:
        limits, engine = self.host.settings.limits, self.host.engine(received.name)
        request, tensors = decode(received.body, BackwardRequest, limits)
        call = _call(self.host, received, request, tensors)
        cotangents = _cotangents(request, call, tensors, engine.backbone.hidden_size)
        check_cotangents(len(cotangents), limits)
        remedy = "Send fewer cotangents or adapters in one request, or lower the rank."
        check_answer("gradients", engine.answer_bytes(call, len(cotangents)), limits, remedy=remedy)
        return BackwardPass(engine, call, cotangents)

    def record_request(self, recorder: Recorder, work: BackwardPass) -> None:
        """Records the request, since the server has seen the cotangents even if `run` fails."""
        recorder.backward(work.engine.name, work.call, work.cotangents)

    def run(self, work: BackwardPass) -> tuple[Tensor, bool]:
        gradients, retained = self.host.with_room(lambda: work.engine.backward(work.call, work.cotangents))
        check_finite("gradients", gradients)
        passes = len(work.call.adapters) * len(work.cotangents)
        self.host.metrics.graphs.labels("retained" if retained else "recomputed").inc()
        self.host.metrics.tokens.labels("backward").inc(work.call.tokens.input_ids.numel() * passes)
        return gradients, retained

    def record(self, recorder: Recorder, work: BackwardPass, result: tuple[Tensor, bool]) -> None:
        """Does nothing: `record_request` has recorded the request, and transcripts contain no gradients."""

    def encode(self, work: BackwardPass, result: tuple[Tensor, bool]) -> Response:
        gradients, retained = result
        message = BackwardResponse(fingerprint=work.engine.backbone.fingerprint, retained=retained)
        return tensors_response(message, {"gradients": gradients})


def _call(
    host: Host, received: Received, request: ForwardRequest | BackwardRequest, tensors: Mapping[str, Tensor]
) -> Call:
    directions = request.directions if isinstance(request, ForwardRequest) else None
    if directions is not None:
        check_directions(directions, host.infos[received.name].limits)
        host.engine(received.name).check_directions(directions)
    along = 0 if directions is None else directions.count
    tokens = read_batch(host, received.name, tensors, adapters=len(request.adapters), directions=along)
    host.engine(received.name).backbone.check_readout(request.readout)
    return Call(received.tenant, request.adapters, request.readout, request.seed, tokens, directions)


def check_hidden(call: Call, hidden_size: int, limits: Limits) -> None:
    """Raises `BodyTooLarge` if the hidden states of a call are over the limit, in float32."""
    batch, length = call.tokens.input_ids.shape
    vectors = call.copies * batch * (length if call.readout.pooling == "none" else 1)
    size = 4 * vectors * call.readout.size(hidden_size)
    check_answer("hidden states", size, limits, remedy="Send fewer texts, or read fewer layers.")


def _cotangents(request: BackwardRequest, call: Call, tensors: Mapping[str, Tensor], width: int) -> Tensor:
    """Returns the cotangents in the request, or expands them from its seed. Raises `InvalidTensor`."""
    batch, length = call.tokens.input_ids.shape
    by_token, size = call.readout.pooling == "none", call.readout.size(width)
    if request.noise is not None:
        shape = (len(call.adapters), batch, length, size) if by_token else (len(call.adapters), batch, size)
        return _expand(request.noise, shape, tensors)
    positions = (None,) if by_token else ()  # the engine checks L against the forward pass
    shape = (None, len(call.adapters), batch, *positions, *layer_axes(call.readout, width))
    return flat(check_tensor(tensors, "cotangents", shape, torch.float32), call.readout)


def _expand(noise: NoiseShare, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> Tensor:
    """Expands a seed into one cotangent of noise, `(1, *shape)`. Raises `InvalidTensor` if one was sent too."""
    if "cotangents" in tensors:
        raise InvalidTensor("The request holds both 'cotangents' and a seed for one.", remedy="Send one of the two.")
    lattice = Lattice(noise.exponent, noise.steps)
    return expand_noise(bytes.fromhex(noise.seed), (1, *shape), lattice)
