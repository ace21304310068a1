"""Reads the padded token batch of a request."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from blindtune.models import Tokens
from blindtune.server.host import Host
from blindtune.server.limits import check_batch
from blindtune.wire import check_tensor


def read_batch(
    host: Host, model: str, tensors: Mapping[str, Tensor], *, adapters: int = 0, directions: int = 0
) -> Tokens:
    """Returns the tokens of a request to a hosted model.

    Args:
        tensors: `input_ids (B, L)` int32, `lengths (B,)` int32 and, if sent, `token_type_ids (B, L)` uint8.
        adapters, directions: number of adapters under which the batch will run, or of directions.
    Raises:
        InvalidTensor: a tensor is missing, or has another shape or dtype.
        EmptyBatch, AdapterMismatch, SequenceTooLong: the batch is outside the model's limits.
        RequestError: the model can't process these tokens (`FrozenBackbone.check_tokens`).
    """
    batch, length = check_tensor(tensors, "input_ids", (None, None), torch.int32).shape
    check_batch(batch, length, adapters, host.infos[model].limits, directions=directions)
    check_tensor(tensors, "lengths", (batch,), torch.int32)
    if "token_type_ids" in tensors:
        check_tensor(tensors, "token_type_ids", (batch, length), torch.uint8)
    tokens = Tokens.from_tensors(dict(tensors))
    host.engine(model).backbone.check_tokens(tokens)
    return tokens
