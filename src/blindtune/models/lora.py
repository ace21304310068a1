"""Many LoRA adapters in one pass over shared frozen weights.

The batch is repeated once for each adapter, adapter-major: rows [i B, (i + 1) B) belong to adapter i. A
forward hook on every linear layer of the transformer's blocks adds scaling * B_i A_i x for the adapters of
the running request. Layers below the first adapted block give the same output for every adapter, so they run
once, on B rows; the rows are repeated where that block begins. (PEFT's own mixed-adapter batch is for
inference only.)

DeBERTa puts one table of relative positions, which all rows share, through layers that may be adapted. That part
of its attention runs for one adapter after the other.
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
"""Arguments of a block that have no row for each example, whatever their shape."""
ModuleShapes = dict[str, tuple[int, int]]
"""Module name -> (out_features, in_features)."""


class LoraLayout:
    """Where each matrix lies in an adapter's weight vector `[P]`: for each module A `(r, in)`, then B `(out, r)`.

    With a seed for A (`LoraSpec.a_seed`) the vector holds the B matrices alone.

    Raises:
        UnknownTargetModule: the spec names a module that the model doesn't have, or names one twice.
        AdapterMismatch: a rank larger than a module's smaller side.
    """

    def __init__(self, spec: LoraSpec, shapes: ModuleShapes) -> None:
        self.spec = spec
        self.shapes: list[tuple[str, int, int]] = []
        seen: set[str] = set()
        for name in spec.modules:
            if name not in shapes or name in seen:
                some = ", ".join(sorted({known.rsplit(".", 1)[-1] for known in shapes}))
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
        travelling = (out + (inside if spec.a_seed is None else 0) for _, out, inside in self.shapes)
        self.size = spec.rank * sum(travelling)

    def fixed_a(self) -> tuple[Tensor, ...]:
        """The A matrices `(r, in)` that follow from the spec's seed, float32; none without a seed."""
        if self.spec.a_seed is None:
            return ()
        return expand_a(self.spec.a_seed, self.spec.rank, tuple(inside for _, _, inside in self.shapes))

    def split(self, weights: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """`A (..., r, in)` and `B (..., out, r)` of each module for weight vectors `(..., P)`.

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
        parts = iter(weights.split([rank * side for side in sides], dim=-1))  # one operation for autograd
        for index, (name, out_features, in_features) in enumerate(self.shapes):
            if fixed:
                a = fixed[index].to(weights).expand(*lead, rank, in_features)
            else:
                a = next(parts).reshape(*lead, rank, in_features)
            matrices[name] = (a, next(parts).reshape(*lead, out_features, rank))
        return matrices

    def join(self, matrices: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The inverse of `split`: weight vectors `(..., P)`."""
        parts: list[Tensor] = []
        for name, _, _ in self.shapes:
            a, b = matrices[name]
            parts += [b.flatten(-2)] if self.spec.a_seed is not None else [a.flatten(-2), b.flatten(-2)]
        return torch.cat(parts, dim=-1)


@lru_cache(maxsize=4)  # a run needs one; they aren't part of the server's budget for adapters
def expand_a(seed: str, rank: int, in_features: tuple[int, ...]) -> tuple[Tensor, ...]:
    """A `(r, in)` for each of these sizes, uniform within ±1/√in as PEFT initialises it (Kaiming, a = √5).

    Made of the seed's ChaCha20 keystream by operations that IEEE 754 rounds correctly, so equal on every machine.
    """
    stream = Keystream(bytes.fromhex(seed))
    return tuple(((2.0 * stream.uniform(rank, size) - 1.0) / math.sqrt(size)).float() for size in in_features)


@dataclass
class _Running:
    """The request that is in the model right now."""

    n: int
    batch: int
    copies: int
    """How many pairs of matrices there are: n, or `n * batch` if each row has its own."""
    matrices: dict[str, tuple[Tensor, Tensor]]
    scaling: float
    dropout: float
    repeat_from: int
    """Index of the first block that gets `n * batch` rows."""
    only: int | None = None
    """The adapter whose rows are in the model while they pass alone."""


class LoraPass:
    """Puts hooks on a frozen model; `adapters(...)` makes them active for the calls inside it."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks = find_blocks(model)
        self.shapes: ModuleShapes = {}
        self._block_of: dict[str, int] = {}
        self._running: _Running | None = None
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
        """Active adapters with weight vectors `(n, P)` for a batch of B rows, or `(n, B, P)`: one for each row.

        Yields by how much to repeat the model's *inputs*: n where the first block is adapted, else 1 (then the
        hidden states are repeated at the first adapted block).
        """
        n, vectors = len(weights), weights.flatten(0, -2)
        first = min(self._block_of[name] for name, _, _ in layout.shapes)
        self._running = _Running(
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
            self._running = None

    def _lora_hook(self, name: str) -> Any:
        def add_lora(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            running = self._running
            if running is None or name not in running.matrices:
                return None
            a, b = running.matrices[name]  # (n, r, in), (n, out, r); n B of them if each row has its own
            x = inputs[0].to(a.dtype)
            if running.only is not None:
                a, b = a[running.only].unsqueeze(0), b[running.only].unsqueeze(0)
            elif len(x) % (running.n * running.batch):
                raise UnknownTargetModule(
                    f"The layer {name!r} gets input that all examples share.", remedy="Leave it out of target_modules."
                )
            if running.dropout:
                x = F.dropout(x, running.dropout)
            rows = x.reshape(len(a), -1, x.shape[-1])  # (n, B L, in)
            low = torch.bmm(rows, a.transpose(1, 2))  # (n, B L, r)
            out = output.reshape(len(a), -1, output.shape[-1])  # (n, B L, out)
            if out.dtype != low.dtype:
                update = torch.bmm(low, b.transpose(1, 2)) * running.scaling
                return output + update.reshape(output.shape).to(output.dtype)
            # in place: a temporary of the output's size costs more time than the products
            return out.baddbmm_(low, b.transpose(1, 2), alpha=running.scaling).reshape(output.shape)

        return add_lora

    def _repeat_hook(self, index: int) -> Any:
        def repeat_rows(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            running = self._running
            if running is None or running.n == 1 or running.repeat_from == 0 or index < running.repeat_from:
                return None
            n, batch = running.n, running.batch
            new_args = tuple(_repeat(value, n, batch) for value in args)
            new_kwargs = {key: v if key in SHARED_ARGUMENTS else _repeat(v, n, batch) for key, v in kwargs.items()}
            return new_args, new_kwargs

        return repeat_rows

    def _one_adapter_at_a_time(self, attention: Any, index: int) -> None:
        together = attention.disentangled_attention_bias

        def by_adapter(query: Tensor, key: Tensor, *shared: Any) -> Tensor:  # (n B heads, L, d / heads) each
            running = self._running
            if running is None or index < running.repeat_from:
                return together(query, key, *shared)
            rows = zip(query.chunk(running.copies), key.chunk(running.copies), strict=True)
            parts: list[Tensor] = []
            try:
                for running.only, (of_query, of_key) in enumerate(rows):
                    parts.append(together(of_query, of_key, *shared))
            finally:
                running.only = None
            return torch.cat(parts)

        attention.disentangled_attention_bias = by_adapter


def _repeat(value: Any, n: int, batch: int) -> Any:
    """Repeats tensors with B rows n times; leaves what is shared by all rows (1-d, other sizes) as it is."""
    if isinstance(value, Tensor):
        if value.ndim >= 2 and value.shape[0] == batch:
            return value.repeat(n, *(1 for _ in value.shape[1:]))
        return value
    if isinstance(value, tuple):
        return tuple(_repeat(item, n, batch) for item in cast("tuple[Any, ...]", value))
    return value


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks in the order in which they run: items of outermost lists of alike modules.

    Raises:
        UnknownTargetModule: a model without such lists.
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
