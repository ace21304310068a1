"""Names of tensors in a method's state: `part.name`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
