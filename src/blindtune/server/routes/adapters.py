"""The route for uploads of adapters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fastapi import APIRouter, Request, Response

from blindtune.errors import BodyTooLarge
from blindtune.server.engine import StoredAdapter
from blindtune.server.limits import check_rank
from blindtune.server.recorder import Recorder
from blindtune.server.routes.handler import Handler, Received, answer_put, json_response
from blindtune.wire import AdapterReceipt, AdapterUpload, check_tensor, decode

router = APIRouter()


@router.put("/v1/adapters/{sha256}", response_model=AdapterReceipt)
async def upload_adapter(sha256: str, request: Request) -> Response:
    """Stores adapter weights under the SHA-256 of the body, for this tenant."""
    return await answer_put(request, sha256, UploadAdapter)


@dataclass(frozen=True)
class NewAdapter:
    """An uploaded adapter that has passed all checks."""

    tenant: str
    sha256: str
    upload: AdapterUpload
    stored: StoredAdapter


class UploadAdapter(Handler[NewAdapter, AdapterReceipt]):
    """Stores `weights (P,)`, float32, in the cache of adapters."""

    def decode(self, received: Received) -> NewAdapter:
        upload, tensors = decode(received.body, AdapterUpload, self.host.settings.limits)
        engine = self.host.engine(upload.model)
        received.check_sha256()
        check_rank(upload.spec.rank, self.host.settings.limits)
        layout = engine.layout(upload.spec)
        weights = check_tensor(tensors, "weights", (None,), torch.float32)
        layout.split(weights)  # raises if they don't fit
        stored = StoredAdapter(upload.model, layout, weights.clone())
        return NewAdapter(received.tenant, received.name, upload, stored)

    def run(self, work: NewAdapter) -> AdapterReceipt:
        nbytes = work.stored.weights.nbytes
        if not self.host.adapters.put((work.tenant, work.sha256), work.stored, nbytes):
            raise BodyTooLarge(
                f"An adapter of {nbytes} bytes is larger than the adapter cache.", remedy="Lower the rank."
            )
        return AdapterReceipt(sha256=work.sha256, parameters=work.stored.layout.size)

    def record(self, recorder: Recorder, work: NewAdapter, result: AdapterReceipt) -> None:
        recorder.adapter(work.tenant, work.sha256, work.upload, work.stored.weights)

    def encode(self, work: NewAdapter, result: AdapterReceipt) -> Response:
        return json_response(result)
