"""The provider's HTTP API, version 1 (see `blindtune.wire.schema` for the messages).

request ──▶ tenant ──▶ a place in the queue ──▶ body, within limits ──▶ `Host`, on the model's thread ──▶ answer
errors ──▶ problem documents; every request ──▶ a count and a line in the log, without its content
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Literal, TypeVar

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from blindtune.errors import (
    PROBLEM_PREFIX,
    BodyTooLarge,
    MalformedMessage,
    RequestError,
    ServerFault,
    TooBusy,
)
from blindtune.models import FrozenBackbone
from blindtune.server.host import Host, ServerSettings
from blindtune.server.metrics import Metrics
from blindtune.wire import (
    MEDIA_TYPE,
    AdapterReceipt,
    Limits,
    ModelInfo,
    ModelList,
    PluginReceipt,
    TokenizerFile,
)

log = structlog.get_logger("blindtune.server")
T = TypeVar("T")
UNSEEN_PATH = "other"


def create_app(models: dict[str, FrozenBackbone], settings: ServerSettings | None = None) -> FastAPI:
    """The ASGI application that hosts `models` (name -> backbone)."""
    host = Host(models, settings or ServerSettings())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        host.close()

    app = FastAPI(title="blindtune", version="1", lifespan=lifespan)
    app.state.host = host
    app.middleware("http")(_observe(host.metrics))
    app.exception_handler(RequestError)(_problem)
    app.exception_handler(HTTPException)(_http_problem)
    app.exception_handler(RequestValidationError)(_validation_problem)
    _add_routes(app, host)
    return app


def _add_routes(app: FastAPI, host: Host) -> None:
    def tenant(request: Request) -> str:
        return host.settings.tokens.tenant(request.headers.get("authorization"))

    @app.get("/v1/models")
    async def list_models(request: Request) -> ModelList:
        """What is hosted here."""
        tenant(request)
        return ModelList(operator_id=host.operator_id, models=list(host.engines))

    @app.get("/v1/models/{model:path}/tokenizer")
    async def send_tokenizer(model: str, request: Request) -> TokenizerFile:
        """The tokenizer as JSON."""
        tenant(request)
        text = host.engine(model).backbone.tokenizer
        return TokenizerFile(tokenizer=text, sha256=hashlib.sha256(text.encode()).hexdigest())

    @app.get("/v1/models/{model:path}/parts/{part}")
    async def send_part(model: str, part: str, request: Request) -> Response:
        """The weights of a split model's bottom or top, or of its trunk's emulator."""
        tenant(request)
        return Response(await asyncio.to_thread(host.part, model, part), media_type=MEDIA_TYPE)

    @app.get("/v1/models/{model:path}")
    async def describe_model(model: str, request: Request) -> ModelInfo:
        """Shapes, names and limits of one model."""
        tenant(request)
        host.engine(model)
        return host.infos[model]

    async def stored(request: Request, sha256: str, put: Callable[[str, str, bytes], T]) -> T:
        owner = tenant(request)
        with host.place():
            body = await _read(request, host.settings.limits)
            return await asyncio.to_thread(put, owner, sha256, body)

    async def answered(request: Request, model: str, work: Callable[[str, str, bytes], bytes]) -> Response:
        owner = tenant(request)
        host.engine(model)
        with host.place():
            body = await _read(request, host.settings.limits)
            answer = await host.on_engine(model, lambda: work(owner, model, body))
        return Response(answer, media_type=MEDIA_TYPE)

    @app.put("/v1/adapters/{sha256}")
    async def upload_adapter(sha256: str, request: Request) -> AdapterReceipt:
        """Stores adapter weights under the SHA-256 of the body, for this tenant."""
        return await stored(request, sha256, host.put_adapter)

    @app.put("/v1/plugins/{sha256}")
    async def plug_in(sha256: str, request: Request) -> PluginReceipt:
        """Stores tuned ends of a split model under the SHA-256 of the body, for this tenant."""
        return await stored(request, sha256, host.put_plugin)

    @app.post("/v1/models/{model:path}/score")
    async def score(model: str, request: Request) -> Response:
        """How likely texts are, with plugged-in ends or without."""
        return await answered(request, model, host.score)

    @app.post("/v1/models/{model:path}/generate")
    async def generate(model: str, request: Request) -> Response:
        """Goes on with one text, with plugged-in ends or without."""
        return await answered(request, model, host.generate)

    @app.post("/v1/models/{model:path}/trunk/{direction}")
    async def trunk(model: str, direction: Literal["forward", "backward"], request: Request) -> Response:
        """Hidden states through the middle of a split model, or cotangents back through it."""
        return await answered(request, model, partial(host.trunk, backward=direction == "backward"))

    @app.post("/v1/models/{model:path}/forward")
    async def forward(model: str, request: Request) -> Response:
        """Hidden states of a batch under n adapters."""
        return await answered(request, model, host.forward)

    @app.post("/v1/models/{model:path}/backward")
    async def backward(model: str, request: Request) -> Response:
        """Gradients of every adapter for every cotangent."""
        return await answered(request, model, host.backward)

    @app.get("/healthz")
    @app.get("/readyz")
    async def healthy() -> dict[str, str]:
        """Alive; models are loaded before the socket opens, so alive is ready."""
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(host.metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def _read(request: Request, limits: Limits) -> bytes:
    """The body; refused as soon as its declared or real size passes the limit."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limits.max_body_bytes:
        raise _too_large(int(declared), limits)
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limits.max_body_bytes:
                raise _too_large(size, limits)
            chunks.append(chunk)
    except ClientDisconnect:
        raise MalformedMessage(f"The client went away after {size} bytes.", remedy="Send the request again.") from None
    return b"".join(chunks)


def _too_large(size: int, limits: Limits) -> BodyTooLarge:
    return BodyTooLarge(
        f"The body has {size} bytes or more; the limit is {limits.max_body_bytes}.", remedy="Send a smaller batch."
    )


def _observe(metrics: Metrics) -> Callable[[Request, Callable[[Request], Awaitable[Response]]], Awaitable[Response]]:
    async def observe(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        """Counts and logs a request by its route, size and status; never by its content."""
        start = time.perf_counter()
        try:
            response = await call_next(request)
        except Exception as error:  # a bug: the client gets a problem document, the log gets the trace
            log.exception("request failed", path=request.url.path)
            response = await _problem(
                request, ServerFault(f"{type(error).__name__} on the server.", remedy="Tell the provider.")
            )
        route = getattr(request.scope.get("route"), "path", UNSEEN_PATH).replace(":path", "")
        seconds = time.perf_counter() - start
        received = int(request.headers.get("content-length") or 0)
        sent = int(response.headers.get("content-length") or 0)
        metrics.requests.labels(route, str(response.status_code)).inc()
        metrics.seconds.labels(route).observe(seconds)
        metrics.bytes_in.labels(route).inc(received)
        metrics.bytes_out.labels(route).inc(sent)
        log.info(
            "request",
            method=request.method,
            route=route,
            status=response.status_code,
            ms=round(seconds * 1000, 1),
            bytes_in=received,
            bytes_out=sent,
        )
        return response

    return observe


async def _problem(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)  # noqa: S101 - registered for this class only
    headers = {"Retry-After": "1"} if isinstance(error, TooBusy) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.to_problem(), error.status, headers, media_type="application/problem+json")


async def _http_problem(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class only
    body = {
        "type": f"{PROBLEM_PREFIX}http-{error.status_code}",
        "title": str(error.detail),
        "status": error.status_code,
        "detail": f"{error.detail}: no such route or method.",
        "remedy": "See the API's routes at /docs.",
    }
    return JSONResponse(body, error.status_code, media_type="application/problem+json")


async def _validation_problem(request: Request, error: Exception) -> Response:
    return await _problem(
        request, MalformedMessage(f"The request doesn't fit the route: {error}.", remedy="See /docs.")
    )
