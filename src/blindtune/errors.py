"""Every error that blindtune raises: what happened, with which value, and what to do about it.

BlindtuneError
├── RequestError                a server refused a request (an RFC 9457 problem document)
│   ├── Unauthenticated         401  no token, or one that the server doesn't know
│   ├── UnknownModel            404  the server doesn't host that model
│   ├── UnknownAdapter          404  the server's cache no longer holds an uploaded adapter
│   ├── MalformedMessage        400  the bytes are not a message: header, layout or JSON are wrong
│   ├── UnsupportedVersion      400  the message speaks another version of the API
│   ├── BodyTooLarge            413  more bytes than the server accepts
│   ├── UnknownTargetModule     422  an adapter names a layer that the model doesn't have
│   ├── UnknownPooling          422  a pooling that the model doesn't offer
│   ├── AdapterMismatch         422  adapter weights that don't fit the model or each other
│   ├── InvalidTensor           422  a tensor with the wrong name, shape or dtype
│   ├── NonFiniteTensor         422  a tensor with NaN or infinity
│   ├── CodecMismatch           422  a tensor in another number format than its message says
│   ├── GraphLost               404  the server has forgotten a forward pass; the client sends it again
│   ├── UnknownPart             404  a part of a model (bottom, top, emulator) that isn't offered
│   ├── UnknownPlugin           404  the server no longer holds tuned ends that were plugged in
│   ├── EmptyBatch              422  a batch without examples or an example without tokens
│   ├── SequenceTooLong         422  more tokens than the model or the server takes
│   ├── TooBusy                 503  the queue is full; the client waits and tries again
│   ├── OutOfMemory             507  the server has not enough memory for a request, even without its caches
│   └── ServerFault             500  a bug or a lost resource on the server
├── OperatorError               the set of operators can't be used
│   ├── OperatorUnreachable     no answer within the client's patience
│   ├── DuplicateOperator       one operator was listed twice
│   └── OperatorsDiffer         the operators don't host the same weights
├── PrivacyError                a request that would break the promised privacy
│   ├── OperatorsDisagree       two operators answered the same question differently
│   ├── SingleOperator          two shares, or both halves of a pad, would meet at one operator
│   ├── BudgetSpent             the next step would reveal more than the run's budget allows
│   └── LabelDependentBatches   which texts the batches hold depends on labels
├── ConfigError                 an option has a value that can't work
├── CacheFull                   the client's store of hidden states has no room for what is asked for
├── EmulatorError               an emulator that is damaged, tampered with, or made from another model
├── DataError                   a data file can't be used as it is
│   ├── MissingColumn           a column that isn't in the file
│   ├── BadEncoding             bytes that aren't UTF-8 text, or broken rows
│   ├── EmptyRows               rows without text or without label
│   └── BadLabels               labels that are missing, constant or don't fit the task
├── CheckpointError             a checkpoint that is incomplete or belongs to another model
└── TranscriptError             a transcript that the audit can't read or score
"""

from __future__ import annotations

from typing import Any, ClassVar

PROBLEM_PREFIX = "urn:blindtune:problem:"


class BlindtuneError(Exception):
    """Base of every error here. `str(error)` is the message followed by the remedy."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(f"{message} {remedy}".strip())
        self.message = message
        self.remedy = remedy


class RequestError(BlindtuneError):
    """A server's refusal. `slug` names the problem type and never changes once released."""

    slug: ClassVar[str] = "request"
    status: ClassVar[int] = 400
    title: ClassVar[str] = "The request was refused"

    def to_problem(self) -> dict[str, Any]:
        """The RFC 9457 problem document of this error."""
        return {
            "type": PROBLEM_PREFIX + self.slug,
            "title": self.title,
            "status": self.status,
            "detail": self.message,
            "remedy": self.remedy,
        }

    @staticmethod
    def from_problem(problem: dict[str, Any], status: int) -> RequestError:
        """The exception for a problem document; `ServerFault` or `RequestError` for unknown types."""
        slug = str(problem.get("type", "")).removeprefix(PROBLEM_PREFIX)
        fallback = ServerFault if status >= 500 else RequestError
        cls = PROBLEMS.get(slug, fallback)
        detail = str(problem.get("detail") or f"The server answered with status {status}.")
        return cls(detail, remedy=str(problem.get("remedy") or ""))


class Unauthenticated(RequestError):
    slug, status, title = "unauthenticated", 401, "Missing or unknown token"


class UnknownModel(RequestError):
    slug, status, title = "unknown-model", 404, "Unknown model"


class UnknownAdapter(RequestError):
    slug, status, title = "unknown-adapter", 404, "Adapter not in the cache"


class MalformedMessage(RequestError):
    slug, status, title = "malformed-message", 400, "Malformed message"


class UnsupportedVersion(RequestError):
    slug, status, title = "unsupported-version", 400, "Unsupported API version"


class BodyTooLarge(RequestError):
    slug, status, title = "body-too-large", 413, "Body over the limit"


class UnknownTargetModule(RequestError):
    slug, status, title = "unknown-target-module", 422, "Unknown target module"


class UnknownPooling(RequestError):
    slug, status, title = "unknown-pooling", 422, "Unknown pooling"


class AdapterMismatch(RequestError):
    slug, status, title = "adapter-mismatch", 422, "Adapter doesn't fit the model"


class InvalidTensor(RequestError):
    slug, status, title = "invalid-tensor", 422, "Wrong tensor name, shape or dtype"


class NonFiniteTensor(RequestError):
    slug, status, title = "non-finite-tensor", 422, "NaN or infinity in a tensor"


class CodecMismatch(RequestError):
    slug, status, title = "codec-mismatch", 422, "Tensor in another codec"


class GraphLost(RequestError):
    slug, status, title = "graph-lost", 404, "Forward pass not in the cache"


class UnknownPart(RequestError):
    slug, status, title = "unknown-part", 404, "Part of a model that isn't offered"


class UnknownPlugin(RequestError):
    slug, status, title = "unknown-plugin", 404, "Tuned ends not in the cache"


class EmptyBatch(RequestError):
    slug, status, title = "empty-batch", 422, "Empty batch"


class SequenceTooLong(RequestError):
    slug, status, title = "sequence-too-long", 422, "Too many tokens"


class TooBusy(RequestError):
    slug, status, title = "too-busy", 503, "The server's queue is full"


class OutOfMemory(RequestError):
    slug, status, title = "out-of-memory", 507, "Not enough memory on the server"


class ServerFault(RequestError):
    slug, status, title = "server-fault", 500, "The server failed"


class OperatorError(BlindtuneError):
    """The operators as given can't train together."""


class OperatorUnreachable(OperatorError):
    """No answer within the client's patience."""


class DuplicateOperator(OperatorError):
    """The same operator was listed twice."""


class OperatorsDiffer(OperatorError):
    """Operators host different weights, so their gradients can't be added up."""


class PrivacyError(BlindtuneError):
    """What was asked for would break the privacy that the method promises."""


class OperatorsDisagree(PrivacyError):
    """Two operators answered the same question differently: one of them is faulty, or cheats."""


class SingleOperator(PrivacyError):
    """Shares of one gradient, or adapters under one pad, would meet at one operator, which reveals the labels."""


class BudgetSpent(PrivacyError):
    """The next message would take μ, or what adapters tell, above the budget; nothing of it was sent."""


class LabelDependentBatches(PrivacyError):
    """Which texts the batches hold depends on labels, so an operator that sees them learns about labels."""


class ConfigError(BlindtuneError):
    """An option has a value that can't work."""


class CacheFull(BlindtuneError):
    """The client's store of hidden states has no room for what is asked for; nothing was sent for it."""


class EmulatorError(BlindtuneError):
    """An emulator that is damaged, tampered with, or made from another model."""


class DataError(BlindtuneError):
    """A data file can't be used as it is."""


class MissingColumn(DataError):
    """A column that isn't in the file."""


class BadEncoding(DataError):
    """A file whose bytes aren't the text that its name promises."""


class EmptyRows(DataError):
    """Rows without text or without label."""


class BadLabels(DataError):
    """Labels that are missing, constant or don't fit the task."""


class CheckpointError(BlindtuneError):
    """A checkpoint that is incomplete or belongs to another model."""


class TranscriptError(BlindtuneError):
    """A transcript that the audit can't read or score."""


PROBLEMS: dict[str, type[RequestError]] = {cls.slug: cls for cls in RequestError.__subclasses__()}
