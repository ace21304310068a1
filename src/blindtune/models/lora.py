"""Several LoRA adapters in one pass over shared frozen weights.

The batch is repeated once for each adapter, adapter-major: rows [i B, (i + 1) B) belong to adapter i. A forward hook on
every linear layer of the transformer's blocks adds scaling * B_i A_i x for the adapters of the current request. Layers
below the first adapted block have the same output for every adapter, so they run once, on B rows; the rows are repeated
at the input of that block. (PEFT's own mixed-adapter batch supports inference only.)

DeBERTa passes one table of relative positions, which all rows share, through layers that may be adapted. That part of
its attention runs once for each adapter.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blindtune.errors import AdapterMismatch, UnknownTargetModule
from blindtune.keystream import Keystream
from blindtune.wire import LoraSpec

SHARED_ARGUMENTS = ("rel_embeddings", "relative_pos")
"""Arguments of a block that aren't batched, whatever their shape."""
ModuleShapes = dict[str, tuple[int, int]]
"""Module name -> (out_features, in_features)."""


class LoraLayout:
    """The position of each matrix in an adapter's weight vector `[P]`: for each module A `(r, in)`, then B `(out, r)`.

    With a seed for A (`LoraSpec.a_seed`) the vector holds the B matrices alone.

    Attributes:
        shapes: (name, out_features, in_features) of each module.
        size: P, the number of weights in the vector.
    Raises:
        UnknownTargetModule: the spec names a module that the model doesn't have, or names one twice.
        AdapterMismatch: the rank is larger than a module's smaller side.
    """

    def __init__(self, spec: LoraSpec, shapes: ModuleShapes) -> None:
        self.spec = spec
        self.shapes: list[tuple[str, int, int]] = []
        seen: set[str] = set()
        for name in spec.modules:
            if name not in shapes or name in seen:
                some = ", ".join(sorted({module.rsplit(".", 1)[-1] for module in shapes}))
                what = "twice" if name in seen else "but the model has no such linear layer"
                raise UnknownTargetModule(
                    f"The adapter names the target module {name!r}, {what}.", remedy=f"Choose among: {some}."
                )
            seen.add(name)
            out_features, in_features = shapes[name]
            if spec.rank > min(out_features, in_features):
                raise AdapterMismatch(
                    f"Rank {spec.rank} is larger than the sides of {name!r}: {out_features} and {in_features}.",
                    remedy="Lower the rank.",
                )
            self.shapes.append((name, out_features, in_features))
        sides = (out + (inside if spec.a_seed is None else 0) for _, out, inside in self.shapes)
        self.size = spec.rank * sum(sides)

    def fixed_a(self) -> tuple[Tensor, ...]:
        """Returns the A matrices `(r, in)` that are expanded from the spec's seed, float32; none without a seed."""
        if self.spec.a_seed is None:
            return ()
        return expand_a(self.spec.a_seed, self.spec.rank, tuple(inside for _, _, inside in self.shapes))

    def split(self, weights: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Splits weight vectors `(..., P)` into `A (..., r, in)` and `B (..., out, r)` of each module.

        Raises:
            AdapterMismatch: the vectors don't have P entries.
        """
        if weights.shape[-1] != self.size:
            raise AdapterMismatch(
                f"The adapter has {weights.shape[-1]} weights, its description needs {self.size}.",
                remedy="Upload the weights that belong to this rank and these target modules.",
            )
        matrices: dict[str, tuple[Tensor, Tensor]] = {}
        fixed = self.fixed_a()
        rank, lead = self.spec.rank, weights.shape[:-1]
        sides = [side for _, out, inside in self.shapes for side in ([out] if fixed else [inside, out])]
        parts = iter(weights.split([rank * side for side in sides], dim=-1))  # a single node in the autograd graph
        for index, (name, out_features, in_features) in enumerate(self.shapes):
            if fixed:
                a = fixed[index].to(weights).expand(*lead, rank, in_features)
            else:
                a = next(parts).reshape(*lead, rank, in_features)
            matrices[name] = (a, next(parts).reshape(*lead, out_features, rank))
        return matrices

    def join(self, matrices: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Joins matrices to weight vectors `(..., P)`. The inverse of `split`."""
        parts: list[Tensor] = []
        for name, _, _ in self.shapes:
            a, b = matrices[name]
            parts += [b.flatten(-2)] if self.spec.a_seed is not None else [a.flatten(-2), b.flatten(-2)]
        return torch.cat(parts, dim=-1)


@lru_cache(maxsize=4)  # a run needs one entry; the server's memory budget for adapters doesn't count them
def expand_a(seed: str, rank: int, in_features: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Expands a seed into matrices A `(r, in)`, uniform within ±1/√in as PEFT initialises them (Kaiming, a = √5).

    They are computed from the seed's ChaCha20 keystream by operations that IEEE 754 rounds correctly, so they are equal
    on every machine.
    """
    stream = Keystream(bytes.fromhex(seed))
    return tuple(((2.0 * stream.uniform(rank, size) - 1.0) / math.sqrt(size)).float() for size in in_features)


@dataclass
class _ActiveAdapters:
    """The adapters of the current pass through the model."""

    n: int
    batch: int
    """Number of rows B before they are repeated."""
    copies: int
    """Number of pairs of matrices: n, or `n * batch` if each row has its own."""
    matrices: dict[str, tuple[Tensor, Tensor]]
    scaling: float
    dropout: float
    repeat_from: int
    """Index of the first block whose input has `n * batch` rows."""
    only: int | None = None
    """Index of the only adapter whose rows are being computed; None while all are."""


class LoraPass:
    """Registers hooks on a frozen model that add LoRA updates inside the context manager `adapters`.

    Attributes:
        blocks: the transformer blocks in the order in which they run.
        shapes: name -> (out_features, in_features) of the linear layers that adapters can target.
    """

    def __init__(self, model: nn.Module) -> None:
        self.blocks = find_blocks(model)
        self.shapes: ModuleShapes = {}
        self._block_of: dict[str, int] = {}
        self._active: _ActiveAdapters | None = None
        names = {module: name for name, module in model.named_modules()}
        for index, block in enumerate(self.blocks):
            block.register_forward_pre_hook(self._repeat_hook(index), with_kwargs=True)
            for module in block.modules():
                if hasattr(module, "disentangled_attention_bias"):
                    self._one_adapter_at_a_time(module, index)
                if isinstance(module, nn.Linear):
                    name = names[module]
                    self.shapes[name] = (module.out_features, module.in_features)
                    self._block_of[name] = index
                    module.register_forward_hook(self._lora_hook(name))

    @contextmanager
    def adapters(self, layout: LoraLayout, weights: Tensor, batch: int, *, train: bool) -> Generator[int]:
        """Activates adapters for calls of the model on a batch of B rows.

        Args:
            weights: weight vectors `(n, P)`, or `(n, B, P)` with one vector for each row.
            train: whether dropout is on.
        Yields:
            How often to repeat the model's *inputs*: n if the first block is adapted, else 1 (then the hidden states
            are repeated at the first adapted block).
        """
        n, vectors = len(weights), weights.flatten(0, -2)
        first = min(self._block_of[name] for name, _, _ in layout.shapes)
        self._active = _ActiveAdapters(
            n=n,
            batch=batch,
            copies=len(vectors),
            matrices=layout.split(vectors),
            scaling=layout.spec.scaling,
            dropout=layout.spec.dropout if train else 0.0,
            repeat_from=first,
        )
        try:
            yield n if first == 0 else 1
        finally:
            self._active = None

    def _lora_hook(self, name: str) -> Any:
        """Returns a forward hook that adds the active adapters' updates to a layer's output."""

        def add_lora(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            active = self._active
            if active is None or name not in active.matrices:
                return None
            a, b = active.matrices[name]  # (n, r, in), (n, out, r); n B of them if each row has its own
            x = inputs[0].to(a.dtype)
            if active.only is not None:
                a, b = a[active.only].unsqueeze(0), b[active.only].unsqueeze(0)
            elif len(x) % (active.n * active.batch):
                raise UnknownTargetModule(
                    f"The layer {name!r} gets input that all examples share.", remedy="Leave it out of target_modules."
                )
            if active.dropout:
                x = F.dropout(x, active.dropout)
            rows = x.reshape(len(a), -1, x.shape[-1])  # (n, B L, in)
            low = torch.bmm(rows, a.transpose(1, 2))  # (n, B L, r)
            out = output.reshape(len(a), -1, output.shape[-1])  # (n, B L, out)
            if out.dtype != low.dtype:
                update = torch.bmm(low, b.transpose(1, 2)) * active.scaling
                return output + update.reshape(output.shape).to(output.dtype)
            # in place, because a temporary of the output's size would take more time than the products
            return out.baddbmm_(low, b.transpose(1, 2), alpha=active.scaling).reshape(output.shape)

        return add_lora

    def _repeat_hook(self, index: int) -> Any:
        """Returns a forward pre-hook that repeats a block's input for each active adapter, if it is the first."""

        def repeat_rows(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            active = self._active
            if active is None or active.n == 1 or active.repeat_from == 0 or index < active.repeat_from:
                return None
            n, batch = active.n, active.batch
            new_args = tuple(_repeat(value, n, batch) for value in args)
            new_kwargs = {key: v if key in SHARED_ARGUMENTS else _repeat(v, n, batch) for key, v in kwargs.items()}
            return new_args, new_kwargs

        return repeat_rows

    def _one_adapter_at_a_time(self, attention: Any, index: int) -> None:
        """Makes a DeBERTa attention compute its bias, which depends on a table that all rows share, per adapter."""
        compute_bias = attention.disentangled_attention_bias

        def by_adapter(query: Tensor, key: Tensor, *shared: Any) -> Tensor:  # (n B heads, L, d / heads) each
            active = self._active
            if active is None or index < active.repeat_from:
                return compute_bias(query, key, *shared)
            queries, keys = query.chunk(active.copies), key.chunk(active.copies)
            parts: list[Tensor] = []
            try:
                for adapter, (own_query, own_key) in enumerate(zip(queries, keys, strict=True)):
                    active.only = adapter
                    parts.append(compute_bias(own_query, own_key, *shared))
            finally:
                active.only = None
            return torch.cat(parts)

        attention.disentangled_attention_bias = by_adapter


def _repeat(value: Any, n: int, batch: int) -> Any:
    """Repeats tensors with B rows n times. Returns other values, which all rows share, unchanged (1-d, other sizes)."""
    if isinstance(value, Tensor):
        if value.ndim >= 2 and value.shape[0] == batch:
            return value.repeat(n, *(1 for _ in value.shape[1:]))
        return value
    if isinstance(value, tuple):
        return tuple(_repeat(item, n, batch) for item in cast("tuple[Any, ...]", value))
    return value


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the transformer blocks in the order in which they run.

    They are the items of the outermost lists of modules of one class with linear layers.

    Raises:
        UnknownTargetModule: the model has no such lists.
    """
    blocks: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or module in inside or len(module) == 0:
            continue
        alike = len({type(child) for child in module}) == 1
        if alike and any(isinstance(part, nn.Linear) for part in module[0].modules()):
            blocks += list(module)
            inside.update(module.modules())
    if not blocks:
        raise UnknownTargetModule("The model has no list of transformer blocks with linear layers.")
    return blocks
