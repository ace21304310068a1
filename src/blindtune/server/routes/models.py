"""The routes that list and describe hosted models, and offer their tokenizers and the parts that clients may hold."""

from __future__ import annotations

import asyncio
import hashlib
from typing import cast

from fastapi import APIRouter, Request, Response

from blindtune.errors import UnknownPart
from blindtune.models.cut.parts import PartName
from blindtune.server.host import Host
from blindtune.server.routes.handler import host_of, tenant_of, tensors_response
from blindtune.wire import ModelInfo, ModelList, PartFile, TokenizerFile

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> ModelList:
    """Lists the hosted models."""
    tenant_of(request)
    host = host_of(request)
    return ModelList(operator_id=host.operator_id, models=list(host.engines))


@router.get("/v1/models/{model:path}/tokenizer")
async def send_tokenizer(model: str, request: Request) -> TokenizerFile:
    """Returns a model's tokenizer as JSON."""
    tenant_of(request)
    text = host_of(request).engine(model).backbone.tokenizer
    return TokenizerFile(tokenizer=text, sha256=hashlib.sha256(text.encode()).hexdigest())


@router.get("/v1/models/{model:path}/parts/{part}")
async def send_part(model: str, part: str, request: Request) -> Response:
    """Returns the weights of a cut model's bottom or top, or of an emulator of its trunk."""
    tenant_of(request)
    return await asyncio.to_thread(part_response, host_of(request), model, part)


@router.get("/v1/models/{model:path}")
async def describe_model(model: str, request: Request) -> ModelInfo:
    """Returns the description of one model: shapes and names of its layers, and limits."""
    tenant_of(request)
    host = host_of(request)
    host.engine(model)
    return host.infos[model]


def part_response(host: Host, model: str, part: str) -> Response:
    """Returns a response with a part's weights under the whole model's names, or with an emulator as it is stored.

    Raises:
        UnknownModel: no such model is hosted.
        UnknownPart: the model doesn't offer this part.
    """
    backbone, info = host.engine(model).backbone, host.infos[model].cut
    if info is None or part not in info.parts:
        offered = "none" if info is None else ", ".join(info.parts)
        raise UnknownPart(
            f"{model!r} offers no part {part!r}.", remedy=f"Offered: {offered} (`blindtune serve --cut`)."
        )
    cut_model = backbone.require_cut()
    emulator = host.emulators[model] if part == "emulator" else None
    message = PartFile(
        part=part,
        config=cut_model.config.to_json_string(),
        bottom=info.bottom,
        top=info.top,
        fingerprint=backbone.fingerprint,
        manifest=None if emulator is None else emulator.text,
    )
    if emulator is not None:
        return tensors_response(message, emulator.tensors)
    return tensors_response(message, cut_model.parts[cast(PartName, part)].weights())
