"""The servers that one client trains over: who they are, whether they can work together, and what each is sent."""

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
    ForwardRequest,
    ForwardResponse,
    Limits,
    LoraSpec,
    ModelInfo,
    ModelList,
    NoiseShare,
    Pooling,
    TokenizerFile,
    check_tensor,
    decode,
    encode,
)

T = TypeVar("T")
D = TypeVar("D", bound=BaseModel)
ANSWER_LIMITS = Limits(max_body_bytes=2**31)
KNOWN_ADAPTERS = 64
UPLOAD_ATTEMPTS = 5


@dataclass(frozen=True)
class Upload:
    """Adapter weights as they travel, and the hash that names them."""

    sha256: str
    body: bytes

    @staticmethod
    def of(model: str, spec: LoraSpec, weights: Tensor) -> Upload:
        body = encode(AdapterUpload(model=model, spec=spec), {"weights": weights})
        return Upload(hashlib.sha256(body).hexdigest(), body)


class Operator:
    """One server, as the client talks to it."""

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
        """Address and identity: another server behind the same address has another name."""
        return f"{self.transport.url} {self.id}"

    def tokenizer(self) -> Tokenizer:
        file = self._read(TokenizerFile, f"{self.path}/tokenizer")
        if hashlib.sha256(file.tokenizer.encode()).hexdigest() != file.sha256:
            raise not_blindtune(self.transport.url)
        return Tokenizer(file.tokenizer, pad_token_id=self.info.pad_token_id, with_types=self.info.token_type_ids)

    def forward(
        self,
        tokens: Tokens,
        uploads: Sequence[Upload],
        pooling: Pooling,
        seed: int | None,
        *,
        retain: bool = False,
        want_hidden: bool = True,
    ) -> Tensor | None:
        """Hidden states `(n, B, ...)` float32; None if they were only to be computed and retained there.

        Args:
            retain: whether a backward call will follow.
        """
        request = ForwardRequest(
            adapters=[upload.sha256 for upload in uploads],
            pooling=pooling,
            seed=seed,
            retain=retain,
            return_hidden=want_hidden,
        )
        answer = self._with_adapters(uploads, f"{self.path}/forward", encode(request, tokens.tensors()))
        message, tensors = decode(answer, ForwardResponse, ANSWER_LIMITS)
        self.check_fingerprint(message.fingerprint)
        if not want_hidden:
            return None
        positions = (None, self.info.hidden_size) if pooling == "none" else (self.info.hidden_size,)
        return check_tensor(tensors, "hidden", (max(1, len(uploads)), len(tokens), *positions), torch.float32)

    def backward(
        self,
        tokens: Tokens,
        uploads: Sequence[Upload],
        pooling: Pooling,
        seed: int | None,
        cotangents: Tensor | NoiseShare,
    ) -> Tensor:
        """Gradients `(m, n, P)` float32 (float64 from servers in float64).

        Args:
            cotangents: `(m, n, B, d)`; or a share of noise, then m = 1.
        """
        noise = cotangents if isinstance(cotangents, NoiseShare) else None
        tensors = {"cotangents": cotangents} if isinstance(cotangents, Tensor) else {}
        names = [upload.sha256 for upload in uploads]
        request = BackwardRequest(adapters=names, pooling=pooling, seed=seed, noise=noise)
        body = encode(request, {**tokens.tensors(), **tensors})
        answer = self._with_adapters(uploads, f"{self.path}/backward", body)
        message, tensors = decode(answer, BackwardResponse, ANSWER_LIMITS)
        self.check_fingerprint(message.fingerprint)
        m = len(cotangents) if isinstance(cotangents, Tensor) else 1
        return check_tensor(tensors, "gradients", (m, len(uploads), None), self._precision)

    def _read(self, kind: type[D], path: str) -> D:
        try:
            return kind.model_validate(self.transport.get(path))
        except ValidationError:
            raise not_blindtune(self.transport.url) from None

    def _with_adapters(self, uploads: Sequence[Upload], path: str, body: bytes) -> bytes:
        """Posts; uploads first what this server hasn't seen, and again if it has forgotten."""
        self._upload(upload for upload in uploads if upload.sha256 not in self._uploaded)
        for _ in range(UPLOAD_ATTEMPTS - 1):
            try:
                return self.transport.post(path, body)
            except UnknownAdapter:  # other tenants may push it out of the cache again
                self._upload(uploads)
        return self.transport.post(path, body)

    def _upload(self, uploads: Iterable[Upload]) -> None:
        for upload in uploads:
            self.transport.put(f"/v1/adapters/{upload.sha256}", upload.body)
            self._uploaded[upload.sha256] = None
            while len(self._uploaded) > KNOWN_ADAPTERS:
                self._uploaded.popitem(last=False)

    def check_fingerprint(self, found: str) -> None:
        """Raises `OperatorsDiffer` if an answer comes from other weights than those that were there at the start."""
        if found != self.info.fingerprint:
            raise OperatorsDiffer(
                f"{self.transport.url} now hosts other weights than at the start (fingerprint {found[:12]}…, "
                f"before {self.info.fingerprint[:12]}…).",
                remedy="Ask the provider to host the first weights again, or start a new run.",
            )


class OperatorPool:
    """All operators of a run, checked against each other, called in parallel.

    Raises:
        OperatorsDiffer: operators that host different weights.
        DuplicateOperator: one operator twice.
    """

    def __init__(self, operators: Sequence[Operator]) -> None:
        self.operators = list(operators)
        self._threads = ThreadPoolExecutor(2 * len(operators), "operator")  # teams call their members
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
        """The servers behind these transports, asked at the same time what they host.

        Raises:
            ConfigError: no servers.
            DuplicateOperator: two addresses of one server.
            OperatorsDiffer: servers that host different weights.
        """
        if not transports:
            raise ConfigError("No servers were given.", remedy="Give at least one address (--server).")
        seen: set[str] = set()
        for transport in transports:
            if transport.url in seen:
                raise DuplicateOperator(f"{transport.url} is listed twice.", remedy="List every operator once.")
            seen.add(transport.url)
        with ThreadPoolExecutor(len(transports), "hello") as threads:
            return OperatorPool(list(threads.map(partial(Operator, model=model), transports)))

    def __len__(self) -> int:
        return len(self.operators)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that all operators offer.

        Raises:
            OperatorsDiffer: they offer different ones, so the same text would be different tokens.
        """
        found = self.parallel([operator.tokenizer for operator in self.operators])
        for operator, tokenizer in zip(self.operators, found, strict=True):
            if tokenizer.json != found[0].json:
                raise OperatorsDiffer(
                    f"{operator.transport.url} offers another tokenizer than {self.operators[0].transport.url}.",
                    remedy="Use operators that host the same model with the same tokenizer.",
                )
        return found[0]

    @property
    def urls(self) -> list[str]:
        """The operators' addresses, in their order."""
        return [operator.transport.url for operator in self.operators]

    @property
    def names(self) -> list[str]:
        """The operators' names, in their order."""
        return [operator.name for operator in self.operators]

    def parallel(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Runs the calls at the same time and waits for all; raises the first error. Calls may call this again.

        One runs in the caller's thread, and so does each that no thread was free for: nested calls never wait for each
        other's threads.
        """
        futures = [self._threads.submit(call) for call in calls[1:]]
        outcomes = [_outcome(calls[0])]
        outcomes += [_outcome(c) if f.cancel() else f for c, f in zip(calls[1:], futures, strict=True)]
        wait(outcomes)
        return [outcome.result() for outcome in outcomes]

    def traffic(self) -> Traffic:
        """Sum over all operators."""
        parts = [operator.transport.traffic for operator in self.operators]
        return Traffic(sum(p.sent for p in parts), sum(p.received for p in parts), sum(p.requests for p in parts))

    def close(self) -> None:
        self._threads.shutdown(wait=False)
        for operator in self.operators:
            operator.transport.close()


def _outcome(call: Callable[[], T]) -> Future[T]:
    """What the call gives or raises in this thread."""
    outcome = Future[T]()
    try:
        outcome.set_result(call())
    except BaseException as error:  # of an interrupt too: it is raised when the other calls are done
        outcome.set_exception(error)
    return outcome
