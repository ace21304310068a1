"""Tuned ends at the provider's, around the real trunk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from blindtune.client.operators import ANSWER_LIMITS, Operator
from blindtune.errors import UnknownPlugin
from blindtune.models.split import pad_rows
from blindtune.wire import (
    GenerateRequest,
    GenerateResponse,
    PluginUpload,
    ScoreRequest,
    ScoreResponse,
    check_tensor,
    decode,
    encode,
)


class RemotePlugin:
    """The hosted model with tuned ends, or (without any) as it is. The provider sees the texts that it is asked about.

    Args:
        operator: a server that hosts the model with `--split`.
        tuned: tensors of a checkpoint of tuned ends; None for the model as it is.
        scaling: LoRA's alpha / rank; None for whole weights.
    Raises:
        UnknownPart: the model isn't split there, or the ends were tuned for another one.
        InvalidTensor: the ends don't fit.
    """

    def __init__(
        self, operator: Operator, tuned: Mapping[str, Tensor] | None = None, scaling: float | None = None
    ) -> None:
        self.operator = operator
        self._body: bytes | None = None
        self.sha256: str | None = None
        """The name under which the server keeps the ends."""
        if tuned is not None:
            upload = PluginUpload(model=operator.info.name, fingerprint=operator.info.fingerprint, scaling=scaling)
            self._body = encode(upload, dict(tuned))
            self.sha256 = hashlib.sha256(self._body).hexdigest()
            self._upload()

    @property
    def nbytes(self) -> int:
        """Bytes of the ends as they travelled."""
        return len(self._body or b"")

    def score(self, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """log p of each token row from its start on `(B,)`, in nats; and whether greedy decoding would write it `(B,)`.

        Raises:
            SequenceTooLong, InvalidTensor: rows that the model can't take, or starts outside them.
        """
        ids, lengths = pad_rows(rows)
        begin = torch.tensor(list(starts), dtype=torch.int32)
        tensors = {"input_ids": ids.to(torch.int32), "lengths": lengths.to(torch.int32), "starts": begin}
        answer = self._ask("score", encode(ScoreRequest(plugin=self.sha256), tensors))
        message, received = decode(answer, ScoreResponse, ANSWER_LIMITS)
        self.operator.check_fingerprint(message.fingerprint)
        likelihoods = check_tensor(received, "log_likelihoods", (len(rows),), torch.float32)
        return likelihoods, check_tensor(received, "greedy", (len(rows),), torch.uint8).bool()

    def generate(
        self, row: Sequence[int], *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> list[int]:
        """Tokens that follow a row, up to the end of the text.

        Args:
            temperature: 0 for the likeliest token at each place.
        Raises:
            SequenceTooLong: no room for so many tokens.
        """
        request = GenerateRequest(plugin=self.sha256, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        ids, lengths = pad_rows([row])
        body = encode(request, {"input_ids": ids.to(torch.int32), "lengths": lengths.to(torch.int32)})
        message, received = decode(self._ask("generate", body), GenerateResponse, ANSWER_LIMITS)
        self.operator.check_fingerprint(message.fingerprint)
        return check_tensor(received, "generated", (None,), torch.int32).tolist()

    def _ask(self, what: str, body: bytes) -> bytes:
        """Posts; uploads the ends again if the server has forgotten them."""
        path = f"{self.operator.path}/{what}"
        try:
            return self.operator.transport.post(path, body)
        except UnknownPlugin:
            self._upload()
            return self.operator.transport.post(path, body)

    def _upload(self) -> None:
        self.operator.transport.put(f"/v1/plugins/{self.sha256}", self._body or b"")
