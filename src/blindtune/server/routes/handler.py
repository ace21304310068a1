"""The contract of every route that takes a body: decode, run, record, encode.

body ──▶ decode, with every check ──▶ run ──▶ record, if the server records ──▶ encode ──▶ response
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
    """What the path names: the hosted model (POST), or the SHA-256 of the body in hexadecimal (PUT)."""
    body: bytes

    def check_sha256(self) -> None:
        """Raises `MalformedMessage` if the path names another body than this one."""
        if hashlib.sha256(self.body).hexdigest() != self.name:
            raise MalformedMessage("The body's SHA-256 isn't the one in the path.", remedy="Send the bytes unchanged.")


class Handler(ABC, Generic[Work, Result]):
    """What a route does with a request. Handlers keep no state of their own."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def answer(self, received: Received) -> Response:
        """Runs the steps in order. An error in one of them ends the request."""
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
        """Reads the body and checks all of it. Raises the `RequestError` of the first check that fails."""

    @abstractmethod
    def run(self, work: Work) -> Result:
        """Computes or stores, and counts what it did in the metrics."""

    def record_request(self, recorder: Recorder, work: Work) -> None:
        """Records, before `run`, a request that belongs in the transcript even if `run` fails."""

    @abstractmethod
    def record(self, recorder: Recorder, work: Work, result: Result) -> None:
        """Records a request that succeeded."""

    @abstractmethod
    def encode(self, work: Work, result: Result) -> Response:
        """Makes the response."""


def host_of(request: Request) -> Host:
    """The state of the server that got this request."""
    return request.app.state.host


def tenant_of(request: Request) -> str:
    """The tenant that sent the request. Raises `Unauthenticated`."""
    return host_of(request).settings.tokens.tenant(request.headers.get("authorization"))


async def answer_post(request: Request, model: str, handler: type[Handler[Any, Any]]) -> Response:
    """Runs the handler on the model's thread.

    Raises:
        Unauthenticated, UnknownModel, TooBusy, BodyTooLarge, MalformedMessage: before the handler runs.
    """
    host, tenant = host_of(request), tenant_of(request)
    host.engine(model)
    with host.queue_slot():
        received = Received(tenant, model, await _read(request, host.settings.limits))
        return await host.on_engine(model, lambda: handler(host).answer(received))


async def answer_put(request: Request, sha256: str, handler: type[Handler[Any, Any]]) -> Response:
    """Runs the handler on a thread that belongs to no model.

    Raises:
        Unauthenticated, TooBusy, BodyTooLarge, MalformedMessage: before the handler runs.
    """
    host, tenant = host_of(request), tenant_of(request)
    with host.queue_slot():
        received = Received(tenant, sha256, await _read(request, host.settings.limits))
        return await asyncio.to_thread(handler(host).answer, received)


def tensors_response(message: Message, tensors: Mapping[str, Tensor]) -> Response:
    """A message with tensors, in the wire format."""
    return Response(encode(message, tensors), media_type=MEDIA_TYPE)


def json_response(message: Message) -> Response:
    """A message without tensors, as JSON."""
    return Response(message.model_dump_json(), media_type="application/json")


async def _read(request: Request, limits: Limits) -> bytes:
    """The body. Its declared size is checked before it is read, and its real size with each chunk."""
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
        raise MalformedMessage(f"The client went away after {size} bytes.", remedy="Send the request again.") from None
    return b"".join(chunks)
