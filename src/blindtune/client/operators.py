"""Operators: the servers that compute for one client. `Operator` calls one of them, `OperatorPool` calls all."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from blindtune.client.transport import Traffic, Transport, not_blindtune
from blindtune.errors import ConfigError, DuplicateOperator, OperatorsDiffer, UnknownAdapter, UnknownModel
from blindtune.models import Tokenizer, Tokens
from blindtune.wire import (
    AdapterUpload,
    BackwardRequest,
    BackwardResponse,
    Codec,
    Directions,
    ForwardRequest,
    ForwardResponse,
    Limits,
    LoraSpec,
    ModelInfo,
    ModelList,
    NoiseShare,
    Readout,
    TokenizerFile,
    by_layer,
    check_tensor,
    decode,
    decode_hidden,
    encode,
)

T = TypeVar("T")
D = TypeVar("D", bound=BaseModel)
ANSWER_LIMITS = Limits(max_body_bytes=2**31)
"""Limits of the responses that a client accepts."""
KNOWN_ADAPTERS = 64
"""Number of uploaded adapters, the most recent ones, that the client assumes to be in each operator's cache."""
UPLOAD_ATTEMPTS = 5


@dataclass(frozen=True)
class Upload:
    """The body of an adapter upload, and its SHA-256, by which requests name the adapter."""

    sha256: str
    body: bytes

    @staticmethod
    def of(model: str, spec: LoraSpec, weights: Tensor) -> Upload:
        """Encodes an adapter's weights `(P,)` for upload."""
        body = encode(AdapterUpload(model=model, spec=spec), {"weights": weights})
        return Upload(hashlib.sha256(body).hexdigest(), body)


class Operator:
    """A client's connection to one server that hosts its model.

    Args:
        transport: the HTTP connection.
        model: name of the hosted model; None if the server hosts a single model.
    Raises:
        UnknownModel: no model was named and the server hosts several, or it doesn't host the model.
        OperatorError: the server isn't a blindtune server.
    """

    def __init__(self, transport: Transport, model: str | None) -> None:
        self.transport = transport
        hosted = self._read(ModelList, "/v1/models")
        self.id = hosted.operator_id
        if model is None:
            if len(hosted.models) != 1:
                raise UnknownModel(
                    f"{transport.url} hosts {len(hosted.models)} models: {', '.join(hosted.models)}.",
                    remedy="Name one of them (--model).",
                )
            model = hosted.models[0]
        self.path = f"/v1/models/{model}"
        self.info = self._read(ModelInfo, self.path)
        self._precision = torch.float64 if self.info.dtype == "float64" else torch.float32
        self._uploaded: OrderedDict[str, None] = OrderedDict()

    @property
    def name(self) -> str:
        """The server's address and id. Another server behind the same address has another name."""
        return f"{self.transport.url} {self.id}"

    def tokenizer(self) -> Tokenizer:
        """Downloads the model's tokenizer."""
        file = self._read(TokenizerFile, f"{self.path}/tokenizer")
        if hashlib.sha256(file.tokenizer.encode()).hexdigest() != file.sha256:
            raise not_blindtune(self.transport.url)
        return Tokenizer(file.tokenizer, pad_token_id=self.info.pad_token_id, with_types=self.info.token_type_ids)

    def forward(
        self,
        tokens: Tokens,
        uploads: Sequence[Upload],
        readout: Readout,
        seed: int | None,
        *,
        retain: bool = False,
        codec: Codec = "fp32",
    ) -> Tensor:
        """Returns hidden states `(n, B, k · d)`, or `(n, B, L, k · d)` for pooling `none`; float32.

        Args:
            tokens: B texts.
            uploads: n adapters; without any, the hidden states are the frozen model's, with n = 1.
            seed: seed of dropout, which is off without one.
            retain: whether the server keeps the autograd graph for a following `backward`.
            codec: codec of the response.
        """
        names = [upload.sha256 for upload in uploads]
        request = ForwardRequest(adapters=names, **dict(readout), codec=codec, seed=seed, retain=retain)
        tensors = self._post_forward(uploads, request, tokens)
        adapters = max(1, len(uploads))
        return decode_hidden(tensors, adapters, tokens.lengths, readout, codec, self.info.hidden_size)

    def tangents(self, tokens: Tokens, readout: Readout, directions: Directions, *, codec: Codec = "fp32") -> Tensor:
        """Returns J(x) v for each direction, `(count, B, k · d)` or `(count, B, L, k · d)`; float32.

        See `blindtune.models.tangents`.
        """
        request = ForwardRequest(**dict(readout), codec=codec, directions=directions)
        tensors = self._post_forward((), request, tokens)
        return decode_hidden(tensors, directions.count, tokens.lengths, readout, codec, self.info.hidden_size)

    def compute(self, tokens: Tokens, uploads: Sequence[Upload], readout: Readout, seed: int | None) -> None:
        """Makes the server compute a forward pass and keep its graph for a following `backward`.

        The arguments are those of `forward`. No hidden states are sent back.
        """
        names = [upload.sha256 for upload in uploads]
        request = ForwardRequest(adapters=names, **dict(readout), seed=seed, retain=True, return_hidden=False)
        self._post_forward(uploads, request, tokens)

    def backward(
        self,
        tokens: Tokens,
        uploads: Sequence[Upload],
        readout: Readout,
        seed: int | None,
        cotangents: Tensor | NoiseShare,
    ) -> Tensor:
        """Returns gradients `(m, n, P)`, float32 (float64 from servers that compute in float64).

        Args:
            tokens, uploads, readout, seed: as in the forward pass.
            cotangents: `(m, n, B, k · d)`; or a share of noise, then m = 1.
        """
        noise = cotangents if isinstance(cotangents, NoiseShare) else None
        tensors: dict[str, Tensor] = {}
        if isinstance(cotangents, Tensor):
            tensors["cotangents"] = by_layer(cotangents, readout)
        names = [upload.sha256 for upload in uploads]
        request = BackwardRequest(adapters=names, **dict(readout), seed=seed, noise=noise)
        body = encode(request, {**tokens.tensors(), **tensors})
        answer = self._with_adapters(uploads, f"{self.path}/backward", body)
        message, tensors = decode(answer, BackwardResponse, ANSWER_LIMITS)
        self.check_fingerprint(message.fingerprint)
        m = len(cotangents) if isinstance(cotangents, Tensor) else 1
        return check_tensor(tensors, "gradients", (m, len(uploads), None), self._precision)

    def _post_forward(self, uploads: Sequence[Upload], request: ForwardRequest, tokens: Tokens) -> dict[str, Tensor]:
        """Posts a forward request. Returns the tensors of the response."""
        answer = self._with_adapters(uploads, f"{self.path}/forward", encode(request, tokens.tensors()))
        message, tensors = decode(answer, ForwardResponse, ANSWER_LIMITS)
        self.check_fingerprint(message.fingerprint)
        return tensors

    def _read(self, kind: type[D], path: str) -> D:
        """Downloads a JSON message. Raises `OperatorError` for anything else."""
        try:
            return kind.model_validate(self.transport.get(path))
        except ValidationError:
            raise not_blindtune(self.transport.url) from None

    def _with_adapters(self, uploads: Sequence[Upload], path: str, body: bytes) -> bytes:
        """Posts a request that names adapters. Uploads adapters that the server doesn't have, or no longer has."""
        self._upload(upload for upload in uploads if upload.sha256 not in self._uploaded)
        for _ in range(UPLOAD_ATTEMPTS - 1):
            try:
                return self.transport.post(path, body)
            except UnknownAdapter:  # uploads of other tenants may evict it from the cache, even repeatedly
                self._upload(uploads)
        return self.transport.post(path, body)

    def _upload(self, uploads: Iterable[Upload]) -> None:
        """Uploads adapters, and records the most recent ones as uploaded."""
        for upload in uploads:
            self.transport.put(f"/v1/adapters/{upload.sha256}", upload.body)
            self._uploaded[upload.sha256] = None
            while len(self._uploaded) > KNOWN_ADAPTERS:
                self._uploaded.popitem(last=False)

    def check_fingerprint(self, fingerprint: str) -> None:
        """Raises `OperatorsDiffer` if a response has another weights' fingerprint than the server had at the start."""
        if fingerprint != self.info.fingerprint:
            raise OperatorsDiffer(
                f"{self.transport.url} now hosts other weights than at the start (fingerprint {fingerprint[:12]}…, "
                f"before {self.info.fingerprint[:12]}…).",
                remedy="Ask the provider to host the first weights again, or start a new run.",
            )


class OperatorPool:
    """The operators of a run. They host the same weights and can be called in parallel.

    Raises:
        OperatorsDiffer: operators host different weights.
        DuplicateOperator: an operator is listed twice.
    """

    def __init__(self, operators: Sequence[Operator]) -> None:
        self.operators = list(operators)
        # twice as many threads as operators, because calls for teams of operators call the team's members in parallel
        self._threads = ThreadPoolExecutor(2 * len(operators), "operator")
        self.info = self.operators[0].info
        for index, operator in enumerate(self.operators):
            for other in self.operators[:index]:
                if operator.id == other.id:
                    raise DuplicateOperator(
                        f"{other.transport.url} and {operator.transport.url} are the same server.",
                        remedy="List every operator once; shares need operators that don't collude.",
                    )
            if operator.info.fingerprint != self.info.fingerprint or operator.info.dtype != self.info.dtype:
                raise OperatorsDiffer(
                    f"{operator.transport.url} hosts other weights than {self.operators[0].transport.url}: "
                    f"fingerprints {operator.info.fingerprint[:12]}… and {self.info.fingerprint[:12]}…, "
                    f"dtypes {operator.info.dtype} and {self.info.dtype}.",
                    remedy="Use operators that host the same weights in the same dtype.",
                )

    @staticmethod
    def connect(transports: Sequence[Transport], model: str | None) -> OperatorPool:
        """Connects to the servers behind these transports, in parallel.

        Raises:
            ConfigError: there are no servers.
            DuplicateOperator: two addresses lead to one server.
            OperatorsDiffer: servers host different weights.
        """
        if not transports:
            raise ConfigError("No servers were given.", remedy="Give at least one address (--server).")
        urls: set[str] = set()
        for transport in transports:
            if transport.url in urls:
                raise DuplicateOperator(f"{transport.url} is listed twice.", remedy="List every operator once.")
            urls.add(transport.url)
        with ThreadPoolExecutor(len(transports), "connect") as threads:
            return OperatorPool(list(threads.map(partial(Operator, model=model), transports)))

    def __len__(self) -> int:
        return len(self.operators)

    def tokenizer(self) -> Tokenizer:
        """Downloads the tokenizer from all operators and returns it.

        Raises:
            OperatorsDiffer: the operators' tokenizers differ, so they would tokenize the same text differently.
        """
        tokenizers = self.parallel([operator.tokenizer for operator in self.operators])
        for operator, tokenizer in zip(self.operators, tokenizers, strict=True):
            if tokenizer.json != tokenizers[0].json:
                raise OperatorsDiffer(
                    f"{operator.transport.url} offers another tokenizer than {self.operators[0].transport.url}.",
                    remedy="Use operators that host the same model with the same tokenizer.",
                )
        return tokenizers[0]

    @property
    def urls(self) -> list[str]:
        """The addresses of the operators, in the order of `operators`."""
        return [operator.transport.url for operator in self.operators]

    @property
    def names(self) -> list[str]:
        """The names of the operators, in the order of `operators`."""
        return [operator.name for operator in self.operators]

    def parallel(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Runs the calls in parallel, waits for all, and returns their results. Raises the first error. Reentrant.

        The first call runs in the caller's thread, and so does every call that no thread has started by then. So nested
        calls can't deadlock by waiting for threads.
        """
        futures = [self._threads.submit(call) for call in calls[1:]]
        outcomes = [_outcome(calls[0])]
        outcomes += [_outcome(c) if f.cancel() else f for c, f in zip(calls[1:], futures, strict=True)]
        wait(outcomes)
        return [outcome.result() for outcome in outcomes]

    def traffic(self) -> Traffic:
        """Returns the traffic with all operators so far."""
        parts = [operator.transport.traffic for operator in self.operators]
        return Traffic(sum(p.sent for p in parts), sum(p.received for p in parts), sum(p.requests for p in parts))

    def close(self) -> None:
        """Closes all connections."""
        self._threads.shutdown(wait=False)
        for operator in self.operators:
            operator.transport.close()


def _outcome(call: Callable[[], T]) -> Future[T]:
    """Runs a call in this thread. Returns a future with its result or exception."""
    outcome = Future[T]()
    try:
        outcome.set_result(call())
    except BaseException as error:  # also an interrupt, which `parallel` raises when the other calls are done
        outcome.set_exception(error)
    return outcome
