"""Size limits of requests. The server checks each before it allocates memory for a request."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, PositiveInt


class Limits(BaseModel):
    """Upper bounds for one request. The model's description publishes them, so that clients can plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_body_bytes: PositiveInt = 256 * 2**20
    """Size of one request body, in bytes."""
    max_answer_bytes: PositiveInt = 2**30
    """Size of the hidden states or gradients in one response, in bytes."""
    max_header_bytes: PositiveInt = 2**20
    """Size of the JSON header inside a body, in bytes."""
    max_tensors: PositiveInt = 64
    """Number of tensors in one message."""
    max_tokens: PositiveInt = 65_536
    """Number of tokens in one batch, counted with padding and once per adapter: n * B * L."""
    max_length: PositiveInt = 512
    """Number of tokens in one sequence."""
    max_adapters: PositiveInt = 16
    """Number of adapters in one batched pass."""
    max_cotangents: PositiveInt = 16
    """Number of cotangents in one backward call."""
    max_rank: PositiveInt = 256
    """Rank of one LoRA adapter."""
    max_directions: PositiveInt = 64
    """Number of directions for tangents that the server offers for one seed: v_0 and the following ones."""
