"""The routes for hidden states of whole models, and for gradients of their adapters.

B: examples; L: tokens; n: adapters; m: cotangents; d: hidden size; P: weights of an adapter.
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
from blindtune.server.limits import check_cotangents, check_gradients
from blindtune.server.recorder import Recorder
from blindtune.server.routes.batch import read_batch
from blindtune.server.routes.handler import Handler, Received, answer_post, tensors_response
from blindtune.wire import (
    BackwardRequest,
    BackwardResponse,
    ForwardRequest,
    ForwardResponse,
    NoiseShare,
    check_finite,
    check_tensor,
    decode,
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
    retain: bool
    return_hidden: bool


class Forward(Handler[ForwardPass, Tensor | None]):
    """Computes hidden states `(n, B, d)` or `(n, B, L, d)`, float32; None if the request has `return_hidden=False`."""

    def decode(self, received: Received) -> ForwardPass:
        request, tensors = decode(received.body, ForwardRequest, self.host.settings.limits)
        call = _call(self.host, received, request, tensors)
        return ForwardPass(self.host.engine(received.name), call, request.retain, request.return_hidden)

    def run(self, work: ForwardPass) -> Tensor | None:
        hidden = self.host.with_room(lambda: work.engine.forward(work.call, retain=work.retain))
        check_finite("hidden", hidden)
        passes = max(1, len(work.call.adapters))
        self.host.metrics.tokens.labels("forward").inc(work.call.tokens.input_ids.numel() * passes)
        return hidden if work.return_hidden else None

    def record(self, recorder: Recorder, work: ForwardPass, result: Tensor | None) -> None:
        recorder.forward(work.engine.name, work.call, result)

    def encode(self, work: ForwardPass, result: Tensor | None) -> Response:
        message = ForwardResponse(fingerprint=work.engine.backbone.fingerprint)
        return tensors_response(message, {} if result is None else {"hidden": result})


@dataclass(frozen=True)
class BackwardPass:
    """A request for a backward pass that has passed all checks. Cotangents are float32.

    Attributes:
        cotangents: `(m, n, B, d)` or `(m, n, B, L, d)`.
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
        check_gradients(engine.answer_bytes(call, len(cotangents)), limits)
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
    tokens = read_batch(host, received.name, tensors, adapters=len(request.adapters))
    return Call(received.tenant, request.adapters, request.pooling, request.seed, tokens)


def _cotangents(request: BackwardRequest, call: Call, tensors: Mapping[str, Tensor], width: int) -> Tensor:
    """Returns the cotangents in the request, or expands them from its seed. Raises `InvalidTensor`."""
    batch, length = call.tokens.input_ids.shape
    by_token = request.pooling == "none"
    if request.noise is not None:
        shape = (len(call.adapters), batch, length, width) if by_token else (len(call.adapters), batch, width)
        return _expand(request.noise, shape, tensors)
    inner = (None, width) if by_token else (width,)  # the engine checks L against the forward pass
    return check_tensor(tensors, "cotangents", (None, len(call.adapters), batch, *inner), torch.float32)


def _expand(noise: NoiseShare, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> Tensor:
    """Expands a seed into one cotangent of noise, `(1, *shape)`. Raises `InvalidTensor` if one was sent too."""
    if "cotangents" in tensors:
        raise InvalidTensor("The request holds both 'cotangents' and a seed for one.", remedy="Send one of the two.")
    lattice = Lattice(noise.exponent, noise.steps)
    return expand_noise(bytes.fromhex(noise.seed), (1, *shape), lattice)
