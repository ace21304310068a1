"""What a server is willing to receive. Every number is checked before memory is set aside."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, PositiveInt


class Limits(BaseModel):
    """Upper bounds for one request. Published in the model's description, so clients can plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_body_bytes: PositiveInt = 256 * 2**20
    """Bytes of one request body."""
    max_answer_bytes: PositiveInt = 2**30
    """Bytes of gradients in one answer."""
    max_header_bytes: PositiveInt = 2**20
    """Bytes of the JSON header inside a body."""
    max_tensors: PositiveInt = 64
    """Tensors in one message."""
    max_tokens: PositiveInt = 65_536
    """Tokens in one batch, padding and adapters counted: n * B * L."""
    max_length: PositiveInt = 512
    """Tokens in one sequence."""
    max_adapters: PositiveInt = 16
    """Adapters in one batched pass."""
    max_cotangents: PositiveInt = 16
    """Cotangents in one backward call."""
    max_rank: PositiveInt = 256
    """Rank of one LoRA adapter."""
