"""`--record DIR`: writes what this server sees as a transcript, the input of `blindtune audit`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from blindtune.models import FrozenBackbone, Tokens
from blindtune.server.engine import Call
from blindtune.wire import AdapterUpload, Event, RecordedModel, Recording, TranscriptWriter, TrunkRequest


class Recorder:
    """Turns calls into transcript events."""

    def __init__(self, folder: Path, operator_id: str, models: dict[str, FrozenBackbone]) -> None:
        described = {
            name: RecordedModel(
                source=backbone.source.requested,
                dtype=str(backbone.dtype).removeprefix("torch."),
                fingerprint=backbone.fingerprint,
                bottom=backbone.split.cut.bottom if backbone.split else None,
                top=backbone.split.cut.top if backbone.split else None,
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
        kind = "trunk-backward" if backward else "trunk-forward"
        event = Event(
            event=0, time=0, tenant=tenant, kind=kind, model=model, up=request.up, down=request.down, forward=forward
        )
        answer = {"answer." + name.split(".", 1)[1]: tensor for name, tensor in sent.items()}
        self._writer.add(event, {**received, **answer})

    def tuned(self, tenant: str, model: str, kind: str, plugin: str | None, tensors: Mapping[str, Tensor]) -> None:
        """Tuned ends that came (`plugin`), or what they were asked about (`score`, `generate`)."""
        names = [] if plugin is None else [plugin]
        event = {"event": 0, "time": 0, "tenant": tenant, "kind": kind, "model": model, "adapters": names}
        self._writer.add(Event.model_validate(event), tensors)

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
