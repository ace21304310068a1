"""The provider's HTTP API, version 1 (see `blindtune.wire.schema` for the messages).

body bytes ──▶ limits ──▶ decode ──▶ engine (its own thread) ──▶ encode ──▶ body bytes
                             └──▶ recorder (if asked for)
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar
from uuid import uuid4

import structlog
import torch
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from torch import Tensor

from blindtune.errors import (
    PROBLEM_PREFIX,
    AdapterMismatch,
    BodyTooLarge,
    EmptyBatch,
    InvalidTensor,
    MalformedMessage,
    RequestError,
    SequenceTooLong,
    ServerFault,
    TooBusy,
    UnknownModel,
    UnknownPart,
)
from blindtune.keystream import expand_noise
from blindtune.models import FrozenBackbone, Tokens
from blindtune.server.auth import TokenStore
from blindtune.server.cache import ByteLRU
from blindtune.server.emulators import load_emulators, with_emulator
from blindtune.server.engine import Call, Engine, RetainedGraph, StoredAdapter
from blindtune.server.metrics import Metrics
from blindtune.server.plugins import Plugins
from blindtune.server.recorder import Recorder
from blindtune.server.trunk import Trunk
from blindtune.wire import (
    MEDIA_TYPE,
    AdapterReceipt,
    AdapterUpload,
    BackwardRequest,
    BackwardResponse,
    ForwardRequest,
    ForwardResponse,
    GenerateRequest,
    Limits,
    ModelInfo,
    ModelList,
    PartFile,
    PluginReceipt,
    ScoreRequest,
    TokenizerFile,
    TrunkRequest,
    check_finite,
    check_tensor,
    decode,
    encode,
)

log = structlog.get_logger("blindtune.server")
T = TypeVar("T")
UNSEEN_PATH = "other"


@dataclass(frozen=True)
class ServerSettings:
    """How a server behaves, apart from what it hosts."""

    tokens: TokenStore = field(default_factory=TokenStore.open_to_all)
    limits: Limits = field(default_factory=Limits)
    graph_bytes: int = 2 * 2**30
    adapter_bytes: int = 2**30
    plugin_bytes: int = 2**30
    """Tuned ends that clients plugged in, of all tenants together."""
    max_queue: int = 64
    record: Path | None = None
    emulators: Sequence[Path] = ()
    """Folders of emulators of hosted models, made by `blindtune emulator build`."""


class Host:
    """Everything behind the routes: engines and their threads, caches, metrics, the recorder.

    Raises:
        EmulatorError: an emulator that is damaged, or of no model that is hosted here.
    """

    def __init__(self, models: dict[str, FrozenBackbone], settings: ServerSettings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.operator_id = uuid4().hex
        self.adapters = ByteLRU[tuple[str, str], StoredAdapter](settings.adapter_bytes, self.metrics.adapter_bytes.set)
        self.graphs = ByteLRU[tuple[str, str], RetainedGraph](settings.graph_bytes, self.metrics.graph_bytes.set)
        self.engines = {name: Engine(name, model, self.adapters, self.graphs) for name, model in models.items()}
        self.trunks = {
            name: Trunk(name, model, self.graphs) for name, model in models.items() if model.split is not None
        }
        self.infos = {name: model.info(name, settings.limits) for name, model in models.items()}
        self.plugins = Plugins(settings.plugin_bytes, settings.limits)
        self.emulators = load_emulators(settings.emulators, models)
        for name in self.emulators:
            self.infos[name] = with_emulator(self.infos[name])
        self.recorder = Recorder(settings.record, self.operator_id, models) if settings.record else None
        self._threads = {name: ThreadPoolExecutor(1, f"engine-{name}") for name in models}
        self._waiting = 0

    def engine(self, model: str) -> Engine:
        if model not in self.engines:
            raise UnknownModel(
                f"This server doesn't host {model!r}.", remedy=f"It hosts: {', '.join(self.engines) or 'nothing'}."
            )
        return self.engines[model]

    def split_backbone(self, model: str) -> FrozenBackbone:
        """A model whose ends clients may hold; raises `UnknownModel` or `UnknownPart`."""
        backbone = self.engine(model).backbone
        if backbone.split is None:
            raise UnknownPart(f"{model!r} is not split here.", remedy="The provider has to serve it with --split.")
        return backbone

    @contextmanager
    def place(self) -> Generator[None]:
        """A place in the queue, taken before the body is read; raises `TooBusy` instead of queueing without end."""
        if self._waiting >= self.settings.max_queue:
            raise TooBusy(f"{self._waiting} requests are waiting.", remedy="Try again in a few seconds.")
        self._waiting += 1
        self.metrics.queue.set(self._waiting)
        try:
            yield
        finally:
            self._waiting -= 1
            self.metrics.queue.set(self._waiting)

    async def on_engine(self, model: str, work: Callable[[], bytes]) -> bytes:
        """Runs `work` on the model's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads[model], work)

    def close(self) -> None:
        for thread in self._threads.values():
            thread.shutdown(wait=True)
        if self.recorder is not None:
            self.recorder.close()

    # What the three POST and PUT routes do, on the engine's thread.

    def put_adapter(self, tenant: str, sha256: str, body: bytes) -> AdapterReceipt:
        upload, tensors = decode(body, AdapterUpload, self.settings.limits)
        engine = self.engine(upload.model)
        _check_name(body, sha256)
        if upload.spec.rank > self.settings.limits.max_rank:
            raise AdapterMismatch(
                f"Rank {upload.spec.rank} is over the limit of {self.settings.limits.max_rank}.",
                remedy="Lower the rank.",
            )
        layout = engine.layout(upload.spec)
        weights = check_tensor(tensors, "weights", (None,), torch.float32)
        layout.split(weights)  # raises if they don't fit
        stored = StoredAdapter(upload.model, layout, weights.clone())
        if not self.adapters.put((tenant, sha256), stored, weights.nbytes):
            raise BodyTooLarge(
                f"An adapter of {weights.nbytes} bytes is larger than the adapter cache.", remedy="Lower the rank."
            )
        if self.recorder is not None:
            self.recorder.adapter(tenant, sha256, upload, weights)
        return AdapterReceipt(sha256=sha256, parameters=layout.size)

    def forward(self, tenant: str, model: str, body: bytes) -> bytes:
        engine = self.engine(model)
        request, tensors = decode(body, ForwardRequest, self.settings.limits)
        call = Call(
            tenant, request.adapters, request.pooling, request.seed, self._tokens(model, request.adapters, tensors)
        )
        hidden = engine.forward(call, retain=request.retain)
        check_finite("hidden", hidden)
        self.metrics.tokens.labels("forward").inc(call.tokens.input_ids.numel() * max(1, len(call.adapters)))
        sent = hidden if request.return_hidden else None
        if self.recorder is not None:
            self.recorder.forward(model, call, sent)
        return encode(
            ForwardResponse(fingerprint=engine.backbone.fingerprint), {} if sent is None else {"hidden": sent}
        )

    def backward(self, tenant: str, model: str, body: bytes) -> bytes:
        engine = self.engine(model)
        request, tensors = decode(body, BackwardRequest, self.settings.limits)
        tokens = self._tokens(model, request.adapters, tensors)
        call = Call(tenant, request.adapters, request.pooling, request.seed, tokens)
        positions = (None, engine.backbone.hidden_size) if request.pooling == "none" else (engine.backbone.hidden_size,)
        shape = (None, len(request.adapters), len(tokens), *positions)
        if request.noise is not None:
            if "cotangents" in tensors:
                raise InvalidTensor(
                    "The request holds both 'cotangents' and a seed for one.", remedy="Send one of the two."
                )
            expanded = [len(tokens), *([tokens.input_ids.shape[1]] if len(positions) > 1 else []), positions[-1]]
            seed, sigma = bytes.fromhex(request.noise.seed), request.noise.sigma
            tensors["cotangents"] = expand_noise(seed, (1, len(request.adapters), *expanded), sigma)
        cotangents = check_tensor(tensors, "cotangents", shape, torch.float32)
        if not 1 <= len(cotangents) <= self.settings.limits.max_cotangents:
            raise InvalidTensor(
                f"The call has {len(cotangents)} cotangents; 1 to {self.settings.limits.max_cotangents} are accepted.",
                remedy="Spread them over several calls.",
            )
        self._check_answer(engine.answer_bytes(call, len(cotangents)))
        if self.recorder is not None:
            self.recorder.backward(model, call, cotangents)
        gradients, retained = engine.backward(call, cotangents)
        check_finite("gradients", gradients)
        self.metrics.graphs.labels("retained" if retained else "recomputed").inc()
        self.metrics.tokens.labels("backward").inc(tokens.input_ids.numel() * len(request.adapters) * len(cotangents))
        return encode(
            BackwardResponse(fingerprint=engine.backbone.fingerprint, retained=retained), {"gradients": gradients}
        )

    def part(self, model: str, part: str) -> bytes:
        """A part's weights, or an emulator as it is stored; raises `UnknownPart`."""
        backbone, info = self.engine(model).backbone, self.infos[model].split
        if backbone.split is None or info is None or part not in info.parts:
            offered = "none" if info is None else ", ".join(info.parts)
            raise UnknownPart(
                f"{model!r} offers no part {part!r}.", remedy=f"Offered: {offered} (`blindtune serve --split`)."
            )
        emulator = self.emulators[model] if part == "emulator" else None
        message = PartFile(
            part=part, config=backbone.split.config.to_json_string(), bottom=info.bottom, top=info.top,
            fingerprint=backbone.fingerprint, manifest=None if emulator is None else emulator.text,
        )  # fmt: skip
        if emulator is not None:
            return encode(message, emulator.tensors)
        return encode(message, backbone.split.parts[part].weights())  # pyright: ignore[reportArgumentType] - checked

    def trunk(self, tenant: str, model: str, body: bytes, *, backward: bool) -> bytes:
        self.split_backbone(model)
        trunk = self.trunks[model]
        request, received = decode(body, TrunkRequest, self.settings.limits)
        lengths = check_tensor(received, "lengths", (None,), torch.int32)
        trunk.check_lengths(lengths, self.infos[model].limits)
        sha256 = hashlib.sha256(body).hexdigest()
        response, sent = (trunk.backward if backward else trunk.forward)(tenant, sha256, request, received)
        direction = "backward" if backward else "forward"
        self.metrics.tokens.labels(direction).inc(int(lengths.sum()))
        if self.recorder is not None:
            named = request.forward if backward else sha256
            self.recorder.trunk(tenant, model, request, named, received, sent, backward=backward)
        return encode(response, sent)

    def put_plugin(self, tenant: str, sha256: str, body: bytes) -> PluginReceipt:
        upload, tensors = self.plugins.decode(body)
        _check_name(body, sha256)
        backbone = self.split_backbone(upload.model)
        receipt = self.plugins.put(tenant, sha256, backbone, upload, tensors)
        if self.recorder is not None:
            self.recorder.tuned(tenant, upload.model, "plugin", sha256, tensors)
        return receipt

    def score(self, tenant: str, model: str, body: bytes) -> bytes:
        request, tensors = decode(body, ScoreRequest, self.settings.limits)
        starts = check_tensor(tensors, "starts", (None,), torch.int32)
        tokens = self._tokens(model, [], tensors)
        backbone = self.split_backbone(model)
        causal = self.plugins.causal(tenant, model, backbone, request.plugin)
        answer = self.plugins.score(causal, backbone, tokens, starts)
        self._note(tenant, model, "score", request.plugin, tokens, {"starts": starts})
        return answer

    def generate(self, tenant: str, model: str, body: bytes) -> bytes:
        request, tensors = decode(body, GenerateRequest, self.settings.limits)
        tokens = self._tokens(model, [], tensors)
        backbone = self.split_backbone(model)
        causal = self.plugins.causal(tenant, model, backbone, request.plugin)
        answer = self.plugins.generate(causal, backbone, tokens, request)
        self._note(tenant, model, "generate", request.plugin, tokens, {})
        return answer

    def _note(
        self, tenant: str, model: str, kind: str, plugin: str | None, tokens: Tokens, more: dict[str, Tensor]
    ) -> None:
        self.metrics.tokens.labels(kind).inc(tokens.input_ids.numel())
        if self.recorder is not None:
            self.recorder.tuned(tenant, model, kind, plugin, {**tokens.tensors(), **more})

    def _check_answer(self, size: int) -> None:
        """Raises `BodyTooLarge` before gradients of that many bytes are computed."""
        limit = self.settings.limits.max_answer_bytes
        if size > limit:
            raise BodyTooLarge(
                f"The gradients would have {size} bytes; the limit is {limit}.",
                remedy="Send fewer cotangents or adapters in one request, or lower the rank.",
            )

    def _tokens(self, model: str, adapters: list[str], tensors: dict[str, Tensor]) -> Tokens:
        limits = self.infos[model].limits
        ids = check_tensor(tensors, "input_ids", (None, None), torch.int32)
        batch, length = ids.shape
        if batch == 0 or length == 0:
            raise EmptyBatch(f"The batch has shape {(batch, length)}.", remedy="Send at least one example.")
        if len(adapters) > limits.max_adapters:
            raise AdapterMismatch(
                f"The request names {len(adapters)} adapters; the limit is {limits.max_adapters}.",
                remedy="Spread them over several requests.",
            )
        if length > limits.max_length:
            raise SequenceTooLong(
                f"The batch is {length} tokens long; the limit is {limits.max_length}.",
                remedy=f"Truncate to {limits.max_length} tokens (--max-length).",
            )
        total = batch * length * max(1, len(adapters))
        if total > limits.max_tokens:
            raise SequenceTooLong(
                f"{batch} examples of {length} tokens under {len(adapters)} adapters make {total} tokens; "
                f"the limit is {limits.max_tokens}.",
                remedy="Send a smaller batch.",
            )
        check_tensor(tensors, "lengths", (batch,), torch.int32)
        if "token_type_ids" in tensors:
            check_tensor(tensors, "token_type_ids", (batch, length), torch.uint8)
        tokens = Tokens.from_tensors(tensors)
        self.engines[model].backbone.check_tokens(tokens)
        return tokens


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


def _check_name(body: bytes, sha256: str) -> None:
    if hashlib.sha256(body).hexdigest() != sha256:
        raise MalformedMessage("The body's SHA-256 isn't the one in the path.", remedy="Send the bytes unchanged.")


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
