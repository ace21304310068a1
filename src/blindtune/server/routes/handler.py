"""The base class of handlers for routes that take a body, and the functions that read requests and run handlers.

body ──▶ decode and check ──▶ run ──▶ record, if the server records ──▶ encode ──▶ response
"""

from __future__ import annotations

import asyncio
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from torch import Tensor

from blindtune.errors import MalformedMessage
from blindtune.server.host import Host
from blindtune.server.limits import check_body
from blindtune.server.recorder import Recorder
from blindtune.wire import MEDIA_TYPE, Limits, encode
from blindtune.wire.schema import Message

Work = TypeVar("Work")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Received:
    """A request with its body."""

    tenant: str
    name: str
    """The name in the path: of the hosted model (POST), or the SHA-256 of the body in hexadecimal (PUT)."""
    body: bytes

    def check_sha256(self) -> None:
        """Raises `MalformedMessage` if the SHA-256 in the path isn't that of the body."""
        if hashlib.sha256(self.body).hexdigest() != self.name:
            raise MalformedMessage("The body's SHA-256 isn't the one in the path.", remedy="Send the bytes unchanged.")


class Handler(ABC, Generic[Work, Result]):
    """Base class of handlers: they compute the response to a request. Handlers have no state except the host."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def answer(self, received: Received) -> Response:
        """Runs all steps, and returns the response. An exception in a step ends the request."""
        recorder = self.host.recorder
        work = self.decode(received)
        if recorder is not None:
            self.record_request(recorder, work)
        result = self.run(work)
        if recorder is not None:
            self.record(recorder, work, result)
        return self.encode(work, result)

    @abstractmethod
    def decode(self, received: Received) -> Work:
        """Decodes and checks the body. Raises the `RequestError` of the first check that fails."""

    @abstractmethod
    def run(self, work: Work) -> Result:
        """Computes the result or stores the upload, and updates the metrics."""

    def record_request(self, recorder: Recorder, work: Work) -> None:
        """Records a request before `run`, if it belongs in the transcript even when `run` fails. Default: nothing."""

    @abstractmethod
    def record(self, recorder: Recorder, work: Work, result: Result) -> None:
        """Records a request that succeeded."""

    @abstractmethod
    def encode(self, work: Work, result: Result) -> Response:
        """Returns the response."""


def host_of(request: Request) -> Host:
    """Returns the host of the server that received the request."""
    return request.app.state.host


def tenant_of(request: Request) -> str:
    """Returns the tenant that sent the request. Raises `Unauthenticated` for a missing or unknown token."""
    return host_of(request).settings.tokens.tenant(request.headers.get("authorization"))


async def answer_post(request: Request, model: str, handler: type[Handler[Any, Any]]) -> Response:
    """Reads the request, runs the handler on the model's thread, and returns the response.

    Raises:
        Unauthenticated, UnknownModel, TooBusy, BodyTooLarge, MalformedMessage: the request is refused before the
            handler runs.
        RequestError: the handler refuses the request.
    """
    host, tenant = host_of(request), tenant_of(request)
    host.engine(model)
    with host.queue_slot():
        received = Received(tenant, model, await _read(request, host.settings.limits))
        return await host.on_engine(model, lambda: handler(host).answer(received))


async def answer_put(request: Request, sha256: str, handler: type[Handler[Any, Any]]) -> Response:
    """Reads the request, runs the handler on a thread that isn't a model's, and returns the response.

    Raises:
        Unauthenticated, TooBusy, BodyTooLarge, MalformedMessage: the request is refused before the handler runs.
        RequestError: the handler refuses the request.
    """
    host, tenant = host_of(request), tenant_of(request)
    with host.queue_slot():
        received = Received(tenant, sha256, await _read(request, host.settings.limits))
        return await asyncio.to_thread(handler(host).answer, received)


def tensors_response(message: Message, tensors: Mapping[str, Tensor]) -> Response:
    """Returns a response with a message and tensors, in the wire format."""
    return Response(encode(message, tensors), media_type=MEDIA_TYPE)


def json_response(message: Message) -> Response:
    """Returns a response with a message without tensors, as JSON."""
    return Response(message.model_dump_json(), media_type="application/json")


async def _read(request: Request, limits: Limits) -> bytes:
    """Returns the body. Its declared size is checked before it is read, and its real size after each chunk."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit():
        check_body(int(declared), limits)
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            check_body(size, limits)
            chunks.append(chunk)
    except ClientDisconnect:
        raise MalformedMessage(
            f"The client disconnected after {size} bytes.", remedy="Send the request again."
        ) from None
    return b"".join(chunks)
