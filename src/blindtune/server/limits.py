"""Checks the limits of a request before the server allocates memory for it.

The functions take the limits of the requested model (`ModelInfo.limits`), or those of the server.
`blindtune.wire.decode` checks the limits of the message format: the size of the header and the number of tensors.
"""

from __future__ import annotations

from torch import Tensor

from blindtune.errors import AdapterMismatch, BodyTooLarge, EmptyBatch, InvalidTensor, SequenceTooLong
from blindtune.wire import Directions, Limits

MAX_TUNED_TENSORS = 4096
"""Largest number of tensors in an upload of tuned parts, which has one or two for each layer, so more than others."""


def for_tuned_parts(limits: Limits) -> Limits:
    """Returns the limits of an upload of tuned parts."""
    return limits.model_copy(update={"max_tensors": MAX_TUNED_TENSORS})


def check_body(size: int, limits: Limits) -> None:
    """Raises `BodyTooLarge` if a request body of at least `size` bytes is over the limit."""
    if size > limits.max_body_bytes:
        raise BodyTooLarge(
            f"The body has {size} bytes or more; the limit is {limits.max_body_bytes}.", remedy="Send a smaller batch."
        )


def check_rank(rank: int, limits: Limits) -> None:
    """Raises `AdapterMismatch` if the rank of an adapter is over the limit."""
    if rank > limits.max_rank:
        raise AdapterMismatch(f"Rank {rank} is over the limit of {limits.max_rank}.", remedy="Lower the rank.")


def check_directions(directions: Directions, limits: Limits) -> None:
    """Raises `AdapterMismatch` if a request for tangents names directions beyond the limit, or of a too large rank."""
    if directions.first + directions.count > limits.max_directions:
        raise AdapterMismatch(
            f"The request names {directions.first + directions.count} directions; the limit is "
            f"{limits.max_directions}.",
            remedy="Use fewer.",
        )
    check_rank(directions.rank, limits)


def check_batch(batch: int, length: int, adapters: int, limits: Limits, *, directions: int = 0) -> None:
    """Checks a padded batch `(batch, length)` that runs under a number of adapters, or along a number of directions.

    Raises:
        EmptyBatch: the batch has no example or no token.
        AdapterMismatch: the request names too many adapters.
        SequenceTooLong: an example has too many tokens, or the batch has too many, counted once for each adapter or
            direction.
    """
    if batch == 0 or length == 0:
        raise EmptyBatch(f"The batch has shape {(batch, length)}.", remedy="Send at least one example.")
    if adapters > limits.max_adapters:
        raise AdapterMismatch(
            f"The request names {adapters} adapters; the limit is {limits.max_adapters}.",
            remedy="Spread them over several requests.",
        )
    if length > limits.max_length:
        raise SequenceTooLong(
            f"The batch is {length} tokens long; the limit is {limits.max_length}.",
            remedy=f"Truncate to {limits.max_length} tokens (--max-length).",
        )
    total = batch * length * max(1, adapters, directions)
    if total > limits.max_tokens:
        raise SequenceTooLong(
            f"{batch} examples of {length} tokens under {directions or adapters} "
            f"{'directions' if directions else 'adapters'} make {total} tokens; the limit is {limits.max_tokens}.",
            remedy="Send a smaller batch.",
        )


def check_lengths(lengths: Tensor, limits: Limits) -> None:
    """Checks a packed batch of examples with `lengths (B,)` tokens. The server pads it to the longest example.

    Raises:
        EmptyBatch: there is no example, or an example without tokens.
        SequenceTooLong: an example, or the padded batch, has too many tokens.
    """
    if len(lengths) == 0 or int(lengths.min()) < 1:
        raise EmptyBatch(
            f"The batch has {len(lengths)} examples, or one without tokens.",
            remedy="Send at least one example with at least one token each.",
        )
    longest = int(lengths.max())
    if longest > limits.max_length:
        raise SequenceTooLong(
            f"An example is {longest} tokens long; the limit is {limits.max_length}.",
            remedy=f"Truncate to {limits.max_length} tokens (--max-length).",
        )
    total = longest * len(lengths)
    if total > limits.max_tokens:
        raise SequenceTooLong(
            f"{len(lengths)} examples of {longest} tokens are {total}; the limit is {limits.max_tokens}.",
            remedy="Send a smaller batch.",
        )


def check_cotangents(count: int, limits: Limits) -> None:
    """Raises `InvalidTensor` for a backward call without cotangents or with too many."""
    if not 1 <= count <= limits.max_cotangents:
        raise InvalidTensor(
            f"The call has {count} cotangents; 1 to {limits.max_cotangents} are accepted.",
            remedy="Spread them over several calls.",
        )


def check_answer(what: str, size: int, limits: Limits, *, remedy: str) -> None:
    """Raises `BodyTooLarge` if tensors of `size` bytes are over the limit. Called before they are computed.

    Args:
        what: what the tensors are, for the message.
        remedy: what the client can do.
    """
    if size > limits.max_answer_bytes:
        raise BodyTooLarge(
            f"The {what} would have {size} bytes; the limit is {limits.max_answer_bytes}.", remedy=remedy
        )


def check_continuation(length: int, new: int, limits: Limits) -> None:
    """Raises `SequenceTooLong` if a text of `length` tokens and `new` generated ones are too long together."""
    if length + new > limits.max_length:
        raise SequenceTooLong(
            f"The text has {length} tokens, and {new} new ones are requested; the limit is {limits.max_length}.",
            remedy="Request fewer new tokens, or shorten the text.",
        )
