"""`--record DIR`: writes what this server sees as a transcript, the input of `blindtune audit`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from blindtune.models import FrozenBackbone, Tokens
from blindtune.server.engine import Call
from blindtune.wire import AdapterUpload, Event, RecordedModel, Recording, TranscriptWriter


class Recorder:
    """Turns calls into transcript events."""

    def __init__(self, folder: Path, operator_id: str, models: dict[str, FrozenBackbone]) -> None:
        described = {
            name: RecordedModel(
                source=backbone.source.requested,
                dtype=str(backbone.dtype).removeprefix("torch."),
                fingerprint=backbone.fingerprint,
            )
            for name, backbone in models.items()
        }
        self._writer = TranscriptWriter(folder, Recording(operator_id=operator_id, models=described))

    def adapter(self, tenant: str, sha256: str, upload: AdapterUpload, weights: Tensor) -> None:
        event = Event(
            event=0, time=0, tenant=tenant, kind="adapter", model=upload.model, adapters=[sha256], spec=upload.spec
        )
        self._writer.add(event, {"weights": weights})

    def forward(self, model: str, call: Call, hidden: Tensor | None) -> None:
        self._writer.add(_event("forward", model, call), _with(call.tokens, "hidden", hidden))

    def backward(self, model: str, call: Call, cotangents: Tensor) -> None:
        self._writer.add(_event("backward", model, call), _with(call.tokens, "cotangents", cotangents))

    def close(self) -> None:
        self._writer.close()


def _event(kind: str, model: str, call: Call) -> Event:
    return Event.model_validate(
        {
            "event": 0,
            "time": 0,
            "tenant": call.tenant,
            "kind": kind,
            "model": model,
            "adapters": call.adapters,
            "pooling": call.pooling,
            "seed": call.seed,
        }
    )


def _with(tokens: Tokens, name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    return tokens.tensors() if tensor is None else {**tokens.tensors(), name: tensor}
