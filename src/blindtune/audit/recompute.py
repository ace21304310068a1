"""Runs texts through adapters, as a server can: hidden states, and Jacobians in the adapters.

The adapters are those of any moment, or what an attacker makes of them (`blindtune.audit.observe.Mean`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from blindtune.audit.observe import Adapter, Features, Mean, Row, Shuffled, View
from blindtune.audit.statistics import Scores
from blindtune.errors import TranscriptError
from blindtune.models import FrozenBackbone, LoraLayout, Tokens

TOKENS_IN_A_PASS = 16_384
Memory = dict[tuple[str, bytes], Scores | None]
"""`(attack, digest of features and labels) -> scores`."""


class Recomputation:
    """Hidden states of texts under checkpoints, each computed once and kept for all views that share it.

    `scores` remembers in the same way what attacks made of them.
    """

    def __init__(self, backbone: FrozenBackbone, on_texts: Callable[[int], None] | None = None) -> None:
        self.backbone, self.on_texts = backbone, on_texts
        self.scores = Memory()
        self._known: dict[tuple[Adapter, ...], dict[Row, Features]] = {}

    def hidden(self, view: View, checkpoint: tuple[Adapter, ...], rows: Sequence[Row]) -> Features:
        """h(x, θ_i): `(n, N, d)`; the empty checkpoint is the frozen model, n = 1."""
        self.ensure(view, [checkpoint], rows)
        known = self._known[checkpoint]
        return np.stack([known[row] for row in rows], axis=1)

    def ensure(self, view: View, checkpoints: Sequence[tuple[Adapter, ...]], rows: Sequence[Row]) -> None:
        """Runs all texts through all checkpoints in shared passes: the layers below the adapters run once."""
        groups: dict[int, list[tuple[Adapter, ...]]] = {}
        for checkpoint in dict.fromkeys(checkpoints):
            groups.setdefault(len(checkpoint), []).append(checkpoint)
        for n, group in groups.items():
            wanted = [row for row in dict.fromkeys(rows) if any(row not in self._known.get(c, {}) for c in group)]
            if not wanted:
                continue
            for c in group:
                self._known.setdefault(c, {})
            layout, weights = self._stack(view, group) if n else (None, None)
            for part in _portions(sorted(wanted, key=len), max(1, n * len(group))):
                with torch.no_grad():
                    hidden = self.backbone.forward(pad_rows(view, part, self.backbone), view.pooling, layout, weights)
                split = hidden.cpu().numpy().reshape(len(group), max(1, n), len(part), -1)
                for c, vectors in zip(group, split, strict=True):
                    self._known[c].update({row: vectors[:, index] for index, row in enumerate(part)})
                if self.on_texts is not None:
                    self.on_texts(len(part))

    def _stack(self, view: View, group: Sequence[tuple[Adapter, ...]]) -> tuple[LoraLayout, Tensor]:
        """The adapters' layout, and the weights `(n * len(group), P)` of all checkpoints."""
        layout = self.layout(view)
        return layout, adapter_weights(view, layout, [name for checkpoint in group for name in checkpoint])

    def layout(self, view: View) -> LoraLayout:
        """Where each matrix of the run's adapters lies.

        Raises:
            TranscriptError: it has none.
        """
        if view.spec is None:
            raise TranscriptError(f"{view.transcript.folder} holds no adapters.", remedy="Record a whole run.")
        return LoraLayout(view.spec, self.backbone.lora.shapes)

    def jacobian(self, view: View, checkpoint: tuple[Adapter, ...], rows: Sequence[Row]) -> Jacobian:
        """∂h/∂θ of a batch under a checkpoint."""
        layout, weights = self._stack(view, [checkpoint])
        return Jacobian(self.backbone, view, layout, weights, rows)


def adapter_weights(view: View, layout: LoraLayout, names: Sequence[Adapter]) -> Tensor:
    """Weights `(n, P)` of adapters, received or synthetic."""
    stored = view.load(_source(name) for name in names)
    return torch.stack(
        [_shuffled(stored[name.of], name.of, layout) if isinstance(name, Shuffled) else stored[name] for name in names]
    )


def _source(name: Adapter) -> str | Mean:
    """What is read from the recording."""
    return name.of if isinstance(name, Shuffled) else name


def _shuffled(weights: Tensor, name: str, layout: LoraLayout) -> Tensor:
    """Each matrix's entries in an order that depends on the adapter's hash alone."""
    random = torch.Generator().manual_seed(int(name[:15], 16))

    def reordered(matrix: Tensor) -> Tensor:
        return matrix.flatten()[torch.randperm(matrix.numel(), generator=random)].reshape(matrix.shape)

    matrices = layout.split(weights)
    return layout.join({module: (reordered(a), reordered(b)) for module, (a, b) in matrices.items()})


def _portions(rows: list[Row], copies: int) -> Iterator[list[Row]]:
    """Consecutive rows whose padded size, times the adapters, stays below `TOKENS_IN_A_PASS`."""
    portion: list[Row] = []
    for row in rows:
        if portion and (len(portion) + 1) * len(row) * copies > TOKENS_IN_A_PASS:
            yield portion
            portion = []
        portion.append(row)
    if portion:
        yield portion


def pad_rows(view: View, rows: Sequence[Row], backbone: FrozenBackbone) -> Tokens:
    """A right-padded batch of texts that this server saw."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), backbone.pad_token_id, dtype=torch.int32)
    types = torch.zeros((len(rows), length), dtype=torch.uint8)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        types[index, : len(row)] = torch.tensor(view.types[row])
    return Tokens(ids, torch.tensor([len(row) for row in rows], dtype=torch.int32), types)


class Jacobian:
    """J_b = ∂h(x_b, θ_i)/∂θ_i for a batch of texts and n adapters, as products with vectors, which are on the CPU."""

    def __init__(
        self, backbone: FrozenBackbone, view: View, layout: LoraLayout, weights: Tensor, rows: Sequence[Row]
    ) -> None:
        self._weights = weights.unsqueeze(1).repeat(1, len(rows), 1).requires_grad_()  # (n, B, P): each text its own
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivatives
            self._hidden = backbone.forward(pad_rows(view, rows, backbone), view.pooling, layout, self._weights)
            self._probe = torch.zeros_like(self._hidden, requires_grad=True)
            (self._pulled,) = torch.autograd.grad(self._hidden, self._weights, self._probe, create_graph=True)

    def pull(self, cotangents: Tensor) -> Tensor:
        """Σ_b J_bᵀ c_b for cotangents `(n, B, d)`: `(n, P)`."""
        return self._each(cotangents).sum(1)

    def push(self, direction: Tensor) -> Tensor:
        """J_b v for a direction `(n, P)` of the adapters: `(n, B, d)`. The derivative of Jᵀc, linear in c, by c."""
        along = direction.unsqueeze(1).expand_as(self._pulled)
        return torch.autograd.grad(self._pulled, self._probe, along, retain_graph=True)[0].cpu()

    def per_example(self, cotangent: Tensor) -> Tensor:
        """J_bᵀ c for each text alone, for a cotangent `(n, d)` that all share: `(B, n P)`."""
        return self._each(cotangent.unsqueeze(1).expand_as(self._hidden)).transpose(0, 1).flatten(1)

    def _each(self, cotangents: Tensor) -> Tensor:
        """J_bᵀ c_b for cotangents `(n, B, d)`: `(n, B, P)`."""
        given = cotangents.to(self._hidden.device)
        return torch.autograd.grad(self._hidden, self._weights, given, retain_graph=True)[0]
