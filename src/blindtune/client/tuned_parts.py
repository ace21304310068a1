"""Deployed models: tuned parts on the provider's server, combined with the real trunk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from blindtune.client.operators import ANSWER_LIMITS, Operator
from blindtune.errors import UnknownTunedParts
from blindtune.models.cut.parts import pad_rows
from blindtune.wire import (
    GenerateRequest,
    GenerateResponse,
    ScoreRequest,
    ScoreResponse,
    TunedPartsUpload,
    check_tensor,
    decode,
    encode,
)


class DeployedModel:
    """The hosted model with tuned parts, or without any. The provider sees the texts of all requests.

    Args:
        operator: a server that hosts the model with `--cut`.
        tuned: tensors of a checkpoint of tuned parts; None for the pretrained model.
        scaling: LoRA's alpha / rank; None for whole weights.
    Raises:
        UnknownPart: the server hosts the model without a cut, or the parts were tuned for another model.
        InvalidTensor: the tuned parts don't fit the model.
    """

    def __init__(
        self, operator: Operator, tuned: Mapping[str, Tensor] | None = None, scaling: float | None = None
    ) -> None:
        self.operator = operator
        self._body: bytes | None = None
        self.sha256: str | None = None
        """SHA-256 of the uploaded tuned parts, by which requests name them; None for the pretrained model."""
        if tuned is not None:
            upload = TunedPartsUpload(model=operator.info.name, fingerprint=operator.info.fingerprint, scaling=scaling)
            self._body = encode(upload, dict(tuned))
            self.sha256 = hashlib.sha256(self._body).hexdigest()
            self._upload()

    @property
    def nbytes(self) -> int:
        """Size of the uploaded tuned parts in bytes."""
        return len(self._body or b"")

    def score(self, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Scores each token row from its start on.

        Args:
            rows: B token rows.
            starts: index of the first scored token in each row.
        Returns:
            log p of the scored tokens `(B,)`, in nats, and whether greedy decoding would generate them `(B,)`.
        Raises:
            SequenceTooLong, InvalidTensor: the model can't process a row, or a start is outside its row.
        """
        ids, lengths = pad_rows(rows)
        begin = torch.tensor(list(starts), dtype=torch.int32)
        tensors = {"input_ids": ids.to(torch.int32), "lengths": lengths.to(torch.int32), "starts": begin}
        answer = self._post("score", encode(ScoreRequest(tuned_parts=self.sha256), tensors))
        message, received = decode(answer, ScoreResponse, ANSWER_LIMITS)
        self.operator.check_fingerprint(message.fingerprint)
        likelihoods = check_tensor(received, "log_likelihoods", (len(rows),), torch.float32)
        return likelihoods, check_tensor(received, "greedy", (len(rows),), torch.uint8).bool()

    def generate(
        self, row: Sequence[int], *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> list[int]:
        """Generates the tokens that follow a row, up to `max_new_tokens` or the end of the text.

        Args:
            temperature: sampling temperature; 0 picks the likeliest token at each position.
        Raises:
            SequenceTooLong: the row and the new tokens are longer than the model allows.
        """
        request = GenerateRequest(
            tuned_parts=self.sha256, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )
        ids, lengths = pad_rows([row])
        body = encode(request, {"input_ids": ids.to(torch.int32), "lengths": lengths.to(torch.int32)})
        message, received = decode(self._post("generate", body), GenerateResponse, ANSWER_LIMITS)
        self.operator.check_fingerprint(message.fingerprint)
        return check_tensor(received, "generated", (None,), torch.int32).tolist()

    def _post(self, route: str, body: bytes) -> bytes:
        """Posts a request. Uploads the tuned parts again if the server no longer has them."""
        path = f"{self.operator.path}/{route}"
        try:
            return self.operator.transport.post(path, body)
        except UnknownTunedParts:
            self._upload()
            return self.operator.transport.post(path, body)

    def _upload(self) -> None:
        """Uploads the tuned parts."""
        self.operator.transport.put(f"/v1/plugins/{self.sha256}", self._body or b"")
