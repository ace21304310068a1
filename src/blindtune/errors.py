"""The exceptions that blindtune raises. A message says what happened and with which value; a remedy says what to do.

BlindtuneError
├── RequestError                a server refused a request (an RFC 9457 problem document)
│   ├── Unauthenticated         401  no token, or one that the server doesn't know
│   ├── UnknownModel            404  the server doesn't host that model
│   ├── UnknownAdapter          404  the server's cache no longer holds an uploaded adapter
│   ├── MalformedMessage        400  the bytes are not a message: header, layout or JSON are wrong
│   ├── UnsupportedVersion      400  the message has another API version
│   ├── BodyTooLarge            413  more bytes than the server accepts
│   ├── UnknownTargetModule     422  an adapter names a layer that the model doesn't have
│   ├── UnknownReadout          422  the model doesn't offer the requested pooling, layers or projection
│   ├── AdapterMismatch         422  adapter weights don't fit the model or each other
│   ├── InvalidTensor           422  a tensor has the wrong name, shape or dtype
│   ├── NonFiniteTensor         422  a tensor holds NaN or infinity
│   ├── CodecMismatch           422  a tensor has another number format than its message says
│   ├── GraphLost               404  the cache no longer holds a forward pass; the client sends it again
│   ├── UnknownPart             404  the server doesn't offer the requested part of a model (bottom, top, emulator)
│   ├── UnknownTunedParts       404  the server no longer holds tuned parts that were deployed
│   ├── EmptyBatch              422  a batch without examples or an example without tokens
│   ├── SequenceTooLong         422  more tokens than the model or the server accepts
│   ├── TooBusy                 503  the queue is full; the client waits and tries again
│   ├── OutOfMemory             507  the server lacks the memory for a request, even with its caches emptied
│   └── ServerFault             500  a bug or a lost resource on the server
├── OperatorError               the set of operators can't be used
│   ├── OperatorUnreachable     an operator didn't answer within the client's timeout
│   ├── DuplicateOperator       one operator was listed twice
│   └── OperatorsDiffer         the operators don't host the same weights
├── PrivacyError                a request would break the promised privacy
│   ├── OperatorsDisagree       two operators answered the same request differently
│   ├── SingleOperator          two shares, or both adapters under one pad, would go to one operator
│   ├── BudgetSpent             the next step would reveal more than the run's budget allows
│   └── LabelDependentBatches   the choice of texts in the batches depends on labels
├── ConfigError                 an option has a value that can't work
│   └── MissingExtra            a package of an optional extra isn't installed
├── CacheFull                   the client's activation store has no room for the requested hidden states
├── EmulatorError               an emulator is damaged, tampered with, or made from another model
├── DataError                   a data file can't be used as it is
│   ├── MissingColumn           the file lacks a column
│   ├── BadEncoding             the file holds bytes that aren't UTF-8 text, or broken rows
│   ├── EmptyRows               rows lack a text or a label
│   └── BadLabels               labels are missing, constant or don't fit the task
├── CheckpointError             a checkpoint is incomplete or belongs to another model
└── TranscriptError             the audit can't read or score a transcript
"""

from __future__ import annotations

from typing import Any, ClassVar

PROBLEM_PREFIX = "urn:blindtune:problem:"


class BlindtuneError(Exception):
    """Base class of all blindtune exceptions. `str(error)` is the message followed by the remedy."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(f"{message} {remedy}".strip())
        self.message = message
        self.remedy = remedy


class RequestError(BlindtuneError):
    """A server refused a request. `slug` names the problem type and never changes once released."""

    slug: ClassVar[str] = "request"
    status: ClassVar[int] = 400
    title: ClassVar[str] = "The request was refused"

    def to_problem(self) -> dict[str, Any]:
        """Returns this error as an RFC 9457 problem document."""
        return {
            "type": PROBLEM_PREFIX + self.slug,
            "title": self.title,
            "status": self.status,
            "detail": self.message,
            "remedy": self.remedy,
        }

    @staticmethod
    def from_problem(problem: dict[str, Any], status: int) -> RequestError:
        """Returns the exception that a problem document describes.

        An unknown type becomes a `ServerFault` for a status of at least 500, and otherwise a `RequestError`.
        """
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


class UnknownReadout(RequestError):
    slug, status, title = "unknown-readout", 422, "Unknown readout"


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


class UnknownTunedParts(RequestError):
    slug, status, title = "unknown-plugin", 404, "Tuned parts not in the cache"


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
    """The given operators can't be used together."""


class OperatorUnreachable(OperatorError):
    """An operator didn't answer within the client's timeout."""


class DuplicateOperator(OperatorError):
    """The same operator was listed twice."""


class OperatorsDiffer(OperatorError):
    """The operators host different weights, so their gradients can't be added up."""


class PrivacyError(BlindtuneError):
    """A request would break the privacy that the method promises."""


class OperatorsDisagree(PrivacyError):
    """Two operators answered the same request differently: one of them is faulty or cheats."""


class SingleOperator(PrivacyError):
    """One operator would receive several shares of one gradient, or both adapters under one pad, and so the labels."""


class BudgetSpent(PrivacyError):
    """The next message would exceed the budget for μ, or for what adapters reveal. No part of that message was sent."""


class LabelDependentBatches(PrivacyError):
    """The choice of texts in the batches depends on labels, so an operator that sees the texts learns about labels."""


class ConfigError(BlindtuneError):
    """An option has a value that can't work."""


class MissingExtra(ConfigError):
    """A package that belongs to an optional extra of blindtune isn't installed."""


class CacheFull(BlindtuneError):
    """The client's activation store has no room for the requested hidden states. Nothing was sent for them."""


class EmulatorError(BlindtuneError):
    """An emulator is damaged, tampered with, or made from another model."""


class DataError(BlindtuneError):
    """A data file can't be used as it is."""


class MissingColumn(DataError):
    """A data file lacks a column."""


class BadEncoding(DataError):
    """A file's content isn't in the format that its name says."""


class EmptyRows(DataError):
    """Rows of a data file lack a text or a label."""


class BadLabels(DataError):
    """Labels are missing, constant or don't fit the task."""


class CheckpointError(BlindtuneError):
    """A checkpoint is incomplete or belongs to another model."""


class TranscriptError(BlindtuneError):
    """The audit can't read or score a transcript."""


PROBLEMS: dict[str, type[RequestError]] = {cls.slug: cls for cls in RequestError.__subclasses__()}
