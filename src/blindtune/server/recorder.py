"""Records the calls of a server as a transcript for audits (`blindtune serve --record DIR`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from blindtune.models import FrozenBackbone, Tokens
from blindtune.server.engine import Call
from blindtune.wire import AdapterUpload, Event, RecordedModel, Recording, TranscriptWriter, TrunkRequest


class Recorder:
    """Writes the calls of a server as the events of a transcript.

    Args:
        folder: folder of the transcript, which may exist already.
        operator_id: the server's random id.
        models: all hosted models: name -> backbone.
    Raises:
        TranscriptError: the folder holds a transcript of other models.
    """

    def __init__(self, folder: Path, operator_id: str, models: dict[str, FrozenBackbone]) -> None:
        described = {name: _describe(backbone) for name, backbone in models.items()}
        self._writer = TranscriptWriter(folder, Recording(operator_id=operator_id, models=described))

    def adapter(self, tenant: str, sha256: str, upload: AdapterUpload, weights: Tensor) -> None:
        """Records an uploaded adapter, `weights (P,)`."""
        self._add("adapter", tenant, upload.model, {"weights": weights}, adapters=[sha256], spec=upload.spec)

    def forward(self, model: str, call: Call, hidden: Tensor | None) -> None:
        """Records a forward call, and the response `hidden (n, B, k · d)` or `(n, B, L, k · d)`, or tangents.

        Args:
            hidden: None if none was requested.
        """
        self._add_call("forward", model, call, _with(call.tokens, "hidden", hidden))

    def backward(self, model: str, call: Call, cotangents: Tensor) -> None:
        """Records a backward call with `cotangents (m, n, B, k · d)` or `(m, n, B, L, k · d)`."""
        self._add_call("backward", model, call, _with(call.tokens, "cotangents", cotangents))

    def trunk(
        self,
        tenant: str,
        model: str,
        request: TrunkRequest,
        forward: str | None,
        received: Mapping[str, Tensor],
        sent: Mapping[str, Tensor],
        *,
        backward: bool,
    ) -> None:
        """Records a pass through a trunk.

        Args:
            forward: SHA-256 of the body of the forward call: of this call, or of the one that a backward call names.
            received, sent: packed tensors of the request and the response, in the request's codecs.
            backward: whether this is a backward call.
        """
        kind = "trunk-backward" if backward else "trunk-forward"
        answer = {"answer." + name.split(".", 1)[1]: tensor for name, tensor in sent.items()}
        tensors = {**received, **answer}
        self._add(kind, tenant, model, tensors, up=request.up, down=request.down, forward=forward)

    def tuned(self, tenant: str, model: str, kind: str, tuned_parts: str | None, tensors: Mapping[str, Tensor]) -> None:
        """Records an upload of tuned parts (`plugin`), or a request that uses them (`score`, `generate`).

        Args:
            tuned_parts: SHA-256 of the upload; None for a request to the pretrained model.
            tensors: tuned weights by name, or the request's `input_ids (B, L)`, `lengths (B,)` and, for `score`,
                `starts (B,)`.
        """
        self._add(kind, tenant, model, tensors, adapters=[] if tuned_parts is None else [tuned_parts])

    def close(self) -> None:
        """Writes the events that are still in memory."""
        self._writer.close()

    def _add_call(self, kind: str, model: str, call: Call, tensors: Mapping[str, Tensor]) -> None:
        fields = {"adapters": call.adapters, "seed": call.seed, "directions": call.directions, **dict(call.readout)}
        self._add(kind, call.tenant, model, tensors, **fields)

    def _add(self, kind: str, tenant: str, model: str, tensors: Mapping[str, Tensor], **fields: Any) -> None:
        """Adds one event. The writer replaces the number and the time that are set here."""
        known = {"event": 0, "time": 0, "kind": kind, "tenant": tenant, "model": model}
        self._writer.add(Event.model_validate({**known, **fields}), tensors)


def _describe(backbone: FrozenBackbone) -> RecordedModel:
    cut = backbone.cut_model.cut if backbone.cut_model else None
    return RecordedModel(
        source=backbone.source.requested,
        dtype=str(backbone.dtype).removeprefix("torch."),
        fingerprint=backbone.fingerprint,
        bottom=cut.bottom if cut else None,
        top=cut.top if cut else None,
    )


def _with(tokens: Tokens, name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    return tokens.tensors() if tensor is None else {**tokens.tensors(), name: tensor}
