"""What stands behind the routes: models and their threads, caches, limits, the recorder, and what each request does.

body bytes ──▶ decode ──▶ checks ──▶ engine, trunk or plugins ──▶ encode ──▶ body bytes
                                        └──▶ recorder (if asked for)
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import torch
from torch import Tensor

from blindtune.errors import (
    AdapterMismatch,
    BodyTooLarge,
    EmptyBatch,
    InvalidTensor,
    MalformedMessage,
    SequenceTooLong,
    TooBusy,
    UnknownModel,
    UnknownPart,
)
from blindtune.lattice import Lattice, expand_noise
from blindtune.models import FrozenBackbone, Tokens
from blindtune.server.auth import TokenStore
from blindtune.server.cache import ByteLRU
from blindtune.server.emulators import load_emulators, with_emulator
from blindtune.server.engine import Call, Engine, RetainedGraph, StoredAdapter
from blindtune.server.memory import with_room
from blindtune.server.metrics import Metrics
from blindtune.server.plugins import Plugins
from blindtune.server.recorder import Recorder
from blindtune.server.trunk import Trunk
from blindtune.wire import (
    AdapterReceipt,
    AdapterUpload,
    BackwardRequest,
    BackwardResponse,
    ForwardRequest,
    ForwardResponse,
    GenerateRequest,
    Limits,
    PartFile,
    PluginReceipt,
    ScoreRequest,
    TrunkRequest,
    check_finite,
    check_tensor,
    decode,
    encode,
)

T = TypeVar("T")


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

    def _with_room(self, work: Callable[[], T]) -> T:
        """Retained graphs make room if memory runs out: they can be had again. Raises `OutOfMemory`."""
        return with_room(work, self.graphs.clear)

    def close(self) -> None:
        for thread in self._threads.values():
            thread.shutdown(wait=True)
        if self.recorder is not None:
            self.recorder.close()

    # What the PUT and POST routes do.

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
        hidden = self._with_room(lambda: engine.forward(call, retain=request.retain))
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
            lattice = Lattice(request.noise.exponent, request.noise.steps)
            seed = bytes.fromhex(request.noise.seed)
            tensors["cotangents"] = expand_noise(seed, (1, len(request.adapters), *expanded), lattice)
        cotangents = check_tensor(tensors, "cotangents", shape, torch.float32)
        if not 1 <= len(cotangents) <= self.settings.limits.max_cotangents:
            raise InvalidTensor(
                f"The call has {len(cotangents)} cotangents; 1 to {self.settings.limits.max_cotangents} are accepted.",
                remedy="Spread them over several calls.",
            )
        self._check_answer(engine.answer_bytes(call, len(cotangents)))
        if self.recorder is not None:
            self.recorder.backward(model, call, cotangents)
        gradients, retained = self._with_room(lambda: engine.backward(call, cotangents))
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
        run = trunk.backward if backward else trunk.forward
        response, sent = self._with_room(lambda: run(tenant, sha256, request, received))
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
        receipt = self._with_room(lambda: self.plugins.put(tenant, sha256, backbone, upload, tensors))
        if self.recorder is not None:
            self.recorder.tuned(tenant, upload.model, "plugin", sha256, tensors)
        return receipt

    def score(self, tenant: str, model: str, body: bytes) -> bytes:
        request, tensors = decode(body, ScoreRequest, self.settings.limits)
        starts = check_tensor(tensors, "starts", (None,), torch.int32)
        tokens = self._tokens(model, [], tensors)
        backbone = self.split_backbone(model)
        causal = self.plugins.causal(tenant, model, backbone, request.plugin)
        answer = self._with_room(lambda: self.plugins.score(causal, backbone, tokens, starts))
        self._note(tenant, model, "score", request.plugin, tokens, {"starts": starts})
        return answer

    def generate(self, tenant: str, model: str, body: bytes) -> bytes:
        request, tensors = decode(body, GenerateRequest, self.settings.limits)
        tokens = self._tokens(model, [], tensors)
        backbone = self.split_backbone(model)
        causal = self.plugins.causal(tenant, model, backbone, request.plugin)
        answer = self._with_room(lambda: self.plugins.generate(causal, backbone, tokens, request))
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


def _check_name(body: bytes, sha256: str) -> None:
    if hashlib.sha256(body).hexdigest() != sha256:
        raise MalformedMessage("The body's SHA-256 isn't the one in the path.", remedy="Send the bytes unchanged.")
