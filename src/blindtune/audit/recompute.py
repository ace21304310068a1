"""Runs texts through adapters, as a server can: hidden states, and Jacobians with respect to the adapters.

The adapters are those of any step, or synthetic ones (`blindtune.audit.observe.Mean`, `Shuffled`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from blindtune.audit.observe import Adapter, Features, Mean, Row, Shuffled, View
from blindtune.audit.solvers import JacobianProducts
from blindtune.audit.statistics import Scores
from blindtune.errors import TranscriptError
from blindtune.models import FrozenBackbone, LoraLayout, Tokens

TOKENS_IN_A_PASS = 16_384
Memory = dict[tuple[str, bytes], Scores | None]
"""Scores by attack and by digest of features and labels."""


class Recomputation:
    """Computes hidden states of texts under checkpoints once, and keeps them for all views that need them.

    Attributes:
        scores: the scores of attacks on these hidden states, kept in the same way.
    """

    def __init__(self, backbone: FrozenBackbone, on_texts: Callable[[int], None] | None = None) -> None:
        self.backbone, self.on_texts = backbone, on_texts
        self.scores = Memory()
        self._known: dict[tuple[Adapter, ...], dict[Row, Features]] = {}

    def hidden(self, view: View, checkpoint: tuple[Adapter, ...], rows: Sequence[Row]) -> Features:
        """Returns h(x, θ_i), `(n, N, d)`. The empty checkpoint is the frozen model, with n = 1."""
        self.ensure(view, [checkpoint], rows)
        known = self._known[checkpoint]
        return np.stack([known[row] for row in rows], axis=1)

    def ensure(self, view: View, checkpoints: Sequence[tuple[Adapter, ...]], rows: Sequence[Row]) -> None:
        """Runs all texts through all checkpoints in shared passes, so that the layers below the adapters run once."""
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
                tokens = token_batch(view, part, self.backbone)
                with torch.no_grad():
                    hidden = self.backbone.forward(tokens, view.readout, layout, weights)
                split = hidden.cpu().numpy().reshape(len(group), max(1, n), len(part), -1)
                for c, vectors in zip(group, split, strict=True):
                    self._known[c].update({row: vectors[:, index] for index, row in enumerate(part)})
                if self.on_texts is not None:
                    self.on_texts(len(part))

    def _stack(self, view: View, group: Sequence[tuple[Adapter, ...]]) -> tuple[LoraLayout, Tensor]:
        """Returns the adapters' layout, and the weights `(n * len(group), P)` of all checkpoints."""
        layout = self.layout(view)
        return layout, adapter_weights(view, layout, [name for checkpoint in group for name in checkpoint])

    def layout(self, view: View) -> LoraLayout:
        """Returns the layout of the run's adapters.

        Raises:
            TranscriptError: the recording has no adapters.
        """
        if view.spec is None:
            raise TranscriptError(f"{view.transcript.folder} holds no adapters.", remedy="Record a whole run.")
        return LoraLayout(view.spec, self.backbone.lora.shapes)

    def jacobian(self, view: View, checkpoint: tuple[Adapter, ...], rows: Sequence[Row]) -> Jacobian:
        """Returns the Jacobian ∂h/∂θ of a batch under a checkpoint."""
        layout, weights = self._stack(view, [checkpoint])
        return Jacobian(self.backbone, view, layout, weights, rows)


def adapter_weights(view: View, layout: LoraLayout, names: Sequence[Adapter]) -> Tensor:
    """Returns weights `(n, P)` of adapters, received or synthetic."""
    stored = view.load(_source(name) for name in names)
    return torch.stack(
        [_shuffled(stored[name.of], name.of, layout) if isinstance(name, Shuffled) else stored[name] for name in names]
    )


def _source(name: Adapter) -> str | Mean:
    """Returns the recorded adapter, or the average of recorded adapters, from which an adapter is made."""
    return name.of if isinstance(name, Shuffled) else name


def _shuffled(weights: Tensor, name: str, layout: LoraLayout) -> Tensor:
    """Returns weights with the entries of each matrix in a random order that depends on the adapter's hash only."""
    random = torch.Generator().manual_seed(int(name[:15], 16))

    def reordered(matrix: Tensor) -> Tensor:
        return matrix.flatten()[torch.randperm(matrix.numel(), generator=random)].reshape(matrix.shape)

    matrices = layout.split(weights)
    return layout.join({module: (reordered(a), reordered(b)) for module, (a, b) in matrices.items()})


def _portions(rows: list[Row], copies: int) -> Iterator[list[Row]]:
    """Splits rows into portions whose padded size, times the number of adapters, is at most `TOKENS_IN_A_PASS`."""
    portion: list[Row] = []
    for row in rows:
        if portion and (len(portion) + 1) * len(row) * copies > TOKENS_IN_A_PASS:
            yield portion
            portion = []
        portion.append(row)
    if portion:
        yield portion


def token_batch(view: View, rows: Sequence[Row], backbone: FrozenBackbone) -> Tokens:
    """Returns a right-padded batch of texts that this server received."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), backbone.pad_token_id, dtype=torch.int32)
    types = torch.zeros((len(rows), length), dtype=torch.uint8)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        types[index, : len(row)] = torch.tensor(view.types[row])
    return Tokens(ids, torch.tensor([len(row) for row in rows], dtype=torch.int32), types)


class Jacobian:
    """Multiplies J_b = ∂h(x_b, θ_i)/∂θ_i with vectors, for a batch of texts and n adapters; inputs are on the CPU."""

    def __init__(
        self, backbone: FrozenBackbone, view: View, layout: LoraLayout, weights: Tensor, rows: Sequence[Row]
    ) -> None:
        tokens = token_batch(view, rows, backbone)

        def hidden(weights_of_each: Tensor) -> Tensor:
            return backbone.forward(tokens, view.readout, layout, weights_of_each)

        own_weights = weights.unsqueeze(1).repeat(1, len(rows), 1)  # (n, B, P): a copy for each text
        self._products = JacobianProducts(hidden, own_weights)

    def pull(self, cotangents: Tensor) -> Tensor:
        """Returns Σ_b J_bᵀ c_b for cotangents `(n, B, d)`: `(n, P)`."""
        return self._products.transposed(cotangents).sum(1)

    def push(self, direction: Tensor) -> Tensor:
        """Returns J_b v for a direction `(n, P)` of the adapters: `(n, B, d)`."""
        of_each = direction.unsqueeze(1).expand(-1, self._products.output.shape[1], -1)
        return self._products.times(of_each).cpu()

    def per_example(self, cotangent: Tensor) -> Tensor:
        """Returns J_bᵀ c of each text, for one cotangent `(n, d)` for all texts: `(B, n P)`."""
        of_each = cotangent.unsqueeze(1).expand_as(self._products.output)
        return self._products.transposed(of_each).transpose(0, 1).flatten(1)
