"""Lower layers that no adapter touches, computed once for each text and kept, for experiments with local operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blindtune.models import FrozenBackbone, Tokenizer, Tokens
from blindtune.wire import Readout

Key = tuple[int, ...]


class LowerLayers:
    """Makes a backbone skip the blocks below `first` for texts whose states up to that block are known."""

    def __init__(self, backbone: FrozenBackbone, first: int) -> None:
        self.backbone, self.first = backbone, first
        self.known: dict[Key, Tensor] = {}
        """Inputs of the blocks 1 … first of each text, `(first, L, d)`."""
        self._current: list[Key] | None = None
        self._captured: dict[int, Tensor] = {}
        for index, block in enumerate(backbone.lora.blocks[: first + 1]):
            if index > 0:
                block.register_forward_pre_hook(self._capture(index), with_kwargs=True, prepend=True)
            if index < first:
                block.forward = self._skippable(block.forward, index)
        self._run, backbone._run = backbone._run, self._on_known  # type: ignore[method-assign]

    def compute(self, rows: list[Any], tokenizer: Tokenizer) -> None:
        """Runs the lower layers on token rows that aren't known yet."""
        missing = sorted({row for row in rows if row.ids not in self.known}, key=len)
        for start in range(0, len(missing) if self.first else 0, 64):
            part = missing[start : start + 64]
            with torch.no_grad():
                self._run(tokenizer.pad(part), Readout(pooling="mean"), 1)
            states = torch.stack([self._captured[index] for index in range(1, self.first + 1)], 1)  # (B, first, L, d)
            for row, own in zip(part, states, strict=True):
                self.known[row.ids] = own[:, : len(row)].clone()
        self._captured.clear()

    def _on_known(self, tokens: Tokens, readout: Readout, repeat: int) -> Tensor:
        lengths = tokens.lengths.tolist()
        keys = [tuple(ids[:length]) for ids, length in zip(tokens.input_ids.tolist(), lengths, strict=True)]
        self._current = keys if repeat == 1 and all(key in self.known for key in keys) else None
        try:
            return self._run(tokens, readout, repeat)
        finally:
            self._current = None

    def _skippable(self, forward: Any, index: int) -> Any:
        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._current is None:
                return forward(hidden_states, *args, **kwargs)
            filled = torch.zeros_like(hidden_states)
            for row, key in zip(filled, self._current, strict=True):
                states = self.known[key][index]
                row[: states.shape[0]] = states
            return filled

        return run

    def _capture(self, index: int) -> Any:
        def capture(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._current is None:
                self._captured[index] = (args[0] if args else kwargs["hidden_states"]).detach()

        return capture
