"""The routes that deploy tuned parts, and score and continue texts with them.

B: texts; L: tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import APIRouter, Request, Response
from torch import Tensor

from blindtune.errors import InvalidTensor
from blindtune.models import FrozenBackbone, Tokens
from blindtune.server.host import Host
from blindtune.server.limits import check_continuation, for_tuned_parts
from blindtune.server.recorder import Recorder
from blindtune.server.routes.batch import read_batch
from blindtune.server.routes.handler import Handler, Received, answer_post, answer_put, json_response, tensors_response
from blindtune.server.tuned_parts import generate_tokens, score_texts
from blindtune.wire import (
    GenerateRequest,
    GenerateResponse,
    ScoreRequest,
    ScoreResponse,
    TunedPartsReceipt,
    TunedPartsUpload,
    check_tensor,
    decode,
)

router = APIRouter()


@router.put("/v1/plugins/{sha256}", response_model=TunedPartsReceipt)
async def deploy(sha256: str, request: Request) -> Response:
    """Stores tuned parts of a cut model under the SHA-256 of the body, for this tenant."""
    return await answer_put(request, sha256, Deploy)


@router.post("/v1/models/{model:path}/score")
async def score(model: str, request: Request) -> Response:
    """Computes the likelihood of texts, with tuned parts or without."""
    return await answer_post(request, model, Score)


@router.post("/v1/models/{model:path}/generate")
async def generate(model: str, request: Request) -> Response:
    """Generates a continuation of one text, with tuned parts or without."""
    return await answer_post(request, model, Generate)


@dataclass(frozen=True)
class NewTunedParts:
    """An upload of tuned parts of a cut model. The tensors have the names of a checkpoint's."""

    tenant: str
    sha256: str
    backbone: FrozenBackbone
    upload: TunedPartsUpload
    tensors: dict[str, Tensor]


class Deploy(Handler[NewTunedParts, TunedPartsReceipt]):
    """Merges tuned parts into the model's weights, and stores the result."""

    def decode(self, received: Received) -> NewTunedParts:
        limits = for_tuned_parts(self.host.settings.limits)
        upload, tensors = decode(received.body, TunedPartsUpload, limits)
        received.check_sha256()
        backbone = self.host.cut_backbone(upload.model)
        return NewTunedParts(received.tenant, received.name, backbone, upload, tensors)

    def run(self, work: NewTunedParts) -> TunedPartsReceipt:
        store = self.host.tuned_parts
        return self.host.with_room(
            lambda: store.put(work.tenant, work.sha256, work.backbone, work.upload, work.tensors)
        )

    def record(self, recorder: Recorder, work: NewTunedParts, result: TunedPartsReceipt) -> None:
        recorder.tuned(work.tenant, work.upload.model, "plugin", work.sha256, work.tensors)

    def encode(self, work: NewTunedParts, result: TunedPartsReceipt) -> Response:
        return json_response(result)


@dataclass(frozen=True)
class Question:
    """Texts that a cut model scores or continues, with a tenant's tuned parts or without."""

    tenant: str
    model: str
    tuned_parts: str | None
    """SHA-256 of the upload; None for the pretrained model."""
    backbone: FrozenBackbone
    causal: Any
    """The whole causal model, with the tuned parts merged."""
    tokens: Tokens


@dataclass(frozen=True)
class ScoreQuestion:
    """A request to score each text's tokens from index `starts (B,)`, int32, on."""

    question: Question
    starts: Tensor


class Score(Handler[ScoreQuestion, dict[str, Tensor]]):
    """Computes `log_likelihoods (B,)` float32, in nats, and `greedy (B,)` uint8."""

    def decode(self, received: Received) -> ScoreQuestion:
        request, tensors = decode(received.body, ScoreRequest, self.host.settings.limits)
        starts = check_tensor(tensors, "starts", (None,), torch.int32)
        question = _question(self.host, received, request.tuned_parts, tensors)
        check_tensor(tensors, "starts", (len(question.tokens),), torch.int32)
        if bool((starts < 1).any()) or bool((starts >= question.tokens.lengths).any()):
            raise InvalidTensor(
                "A start is outside its text, or at its first token.", remedy="Send 1 ≤ start < length."
            )
        return ScoreQuestion(question, starts)

    def run(self, work: ScoreQuestion) -> dict[str, Tensor]:
        asked = work.question
        scores = self.host.with_room(lambda: score_texts(asked.causal, asked.backbone, asked.tokens, work.starts))
        self.host.metrics.tokens.labels("score").inc(asked.tokens.input_ids.numel())
        return scores

    def record(self, recorder: Recorder, work: ScoreQuestion, result: dict[str, Tensor]) -> None:
        asked = work.question
        tensors = {**asked.tokens.tensors(), "starts": work.starts}
        recorder.tuned(asked.tenant, asked.model, "score", asked.tuned_parts, tensors)

    def encode(self, work: ScoreQuestion, result: dict[str, Tensor]) -> Response:
        return tensors_response(ScoreResponse(fingerprint=work.question.backbone.fingerprint), result)


@dataclass(frozen=True)
class GenerateQuestion:
    """A request to continue one text."""

    question: Question
    request: GenerateRequest


class Generate(Handler[GenerateQuestion, Tensor]):
    """Computes the new tokens `(T,)`, int32, without the text's own tokens and without the end-of-text token."""

    def decode(self, received: Received) -> GenerateQuestion:
        request, tensors = decode(received.body, GenerateRequest, self.host.settings.limits)
        question = _question(self.host, received, request.tuned_parts, tensors)
        texts, length = question.tokens.input_ids.shape
        if texts != 1:
            raise InvalidTensor(f"The request has {texts} texts to continue.", remedy="Send one text at a time.")
        check_continuation(length, request.max_new_tokens, self.host.infos[received.name].limits)
        return GenerateQuestion(question, request)

    def run(self, work: GenerateQuestion) -> Tensor:
        asked = work.question
        generated = self.host.with_room(
            lambda: generate_tokens(asked.causal, asked.backbone, asked.tokens.input_ids, work.request)
        )
        self.host.metrics.tokens.labels("generate").inc(asked.tokens.input_ids.numel())
        return generated

    def record(self, recorder: Recorder, work: GenerateQuestion, result: Tensor) -> None:
        asked = work.question
        recorder.tuned(asked.tenant, asked.model, "generate", asked.tuned_parts, asked.tokens.tensors())

    def encode(self, work: GenerateQuestion, result: Tensor) -> Response:
        message = GenerateResponse(fingerprint=work.question.backbone.fingerprint)
        return tensors_response(message, {"generated": result})


def _question(host: Host, received: Received, tuned_parts: str | None, tensors: Mapping[str, Tensor]) -> Question:
    tenant, model = received.tenant, received.name
    tokens = read_batch(host, model, tensors)
    backbone = host.cut_backbone(model)
    causal = host.tuned_parts.causal(tenant, model, backbone, tuned_parts)
    return Question(tenant, model, tuned_parts, backbone, causal, tokens)
