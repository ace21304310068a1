"""The route for forward and backward passes of a cut model's trunk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from fastapi import APIRouter, Request, Response
from torch import Tensor

from blindtune.server.limits import check_lengths
from blindtune.server.recorder import Recorder
from blindtune.server.routes.handler import Handler, Received, answer_post, tensors_response
from blindtune.server.trunk import Answer
from blindtune.wire import TrunkRequest, check_tensor, decode

router = APIRouter()


@router.post("/v1/models/{model:path}/trunk/{direction}")
async def trunk(model: str, direction: Literal["forward", "backward"], request: Request) -> Response:
    """Computes a forward pass of a cut model's trunk over hidden states, or a backward pass over cotangents."""
    return await answer_post(request, model, TrunkForward if direction == "forward" else TrunkBackward)


@dataclass(frozen=True)
class TrunkPass:
    """A request for a pass of a trunk: `lengths (B,)`, int32, and packed tensors in the request's codec."""

    tenant: str
    model: str
    sha256: str
    """SHA-256 of the request's body, under which the graph of a forward pass is cached."""
    request: TrunkRequest
    received: dict[str, Tensor]


class TrunkHandler(Handler[TrunkPass, Answer]):
    """Computes the trunk's output, or the gradients with respect to its input; both are packed, `(N, d)`."""

    backward: ClassVar[bool]

    def decode(self, received: Received) -> TrunkPass:
        self.host.cut_backbone(received.name)
        request, tensors = decode(received.body, TrunkRequest, self.host.settings.limits)
        lengths = check_tensor(tensors, "lengths", (None,), torch.int32)
        check_lengths(lengths, self.host.infos[received.name].limits)
        sha256 = hashlib.sha256(received.body).hexdigest()
        return TrunkPass(received.tenant, received.name, sha256, request, tensors)

    def run(self, work: TrunkPass) -> Answer:
        trunk = self.host.trunks[work.model]
        compute = trunk.backward if self.backward else trunk.forward
        answer = self.host.with_room(lambda: compute(work.tenant, work.sha256, work.request, work.received))
        direction = "backward" if self.backward else "forward"
        self.host.metrics.tokens.labels(direction).inc(int(work.received["lengths"].sum()))
        return answer

    def record(self, recorder: Recorder, work: TrunkPass, result: Answer) -> None:
        named = work.request.forward if self.backward else work.sha256
        _, sent = result
        recorder.trunk(work.tenant, work.model, work.request, named, work.received, sent, backward=self.backward)

    def encode(self, work: TrunkPass, result: Answer) -> Response:
        return tensors_response(*result)


class TrunkForward(TrunkHandler):
    """Computes the trunk's output s_B from its input s_A."""

    backward = False


class TrunkBackward(TrunkHandler):
    """Computes gradients with respect to s_A from cotangents with respect to s_B."""

    backward = True
