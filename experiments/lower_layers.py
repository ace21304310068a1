"""Lower layers that no adapter touches, computed once for each text and kept, for experiments with local operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blindtune.models import FrozenBackbone, Tokenizer, Tokens

Key = tuple[int, ...]


class LowerLayers:
    """Makes a backbone skip the blocks below `first` for texts whose input to that block is known."""

    def __init__(self, backbone: FrozenBackbone, first: int) -> None:
        self.backbone = backbone
        self.known: dict[Key, Tensor] = {}
        self._current: list[Key] | None = None
        self._captured: Tensor | None = None
        blocks = backbone.lora.blocks
        blocks[first].register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
        for block in blocks[:first]:
            block.forward = self._skippable(block.forward)
        self._run, backbone._run = backbone._run, self._on_known  # type: ignore[method-assign]

    def compute(self, rows: list[Any], tokenizer: Tokenizer) -> None:
        """Runs the lower layers on token rows that aren't known yet."""
        missing = sorted({row for row in rows if row.ids not in self.known}, key=len)
        for start in range(0, len(missing), 64):
            part = missing[start : start + 64]
            with torch.no_grad():
                self._run(tokenizer.pad(part), "mean", 1)
            assert self._captured is not None
            for row, states in zip(part, self._captured, strict=True):
                self.known[row.ids] = states[: len(row)].clone()
        self._captured = None

    def _on_known(self, tokens: Tokens, pooling: Any, repeat: int) -> Tensor:
        lengths = tokens.lengths.tolist()
        keys = [tuple(ids[:length]) for ids, length in zip(tokens.input_ids.tolist(), lengths, strict=True)]
        self._current = keys if repeat == 1 and all(key in self.known for key in keys) else None
        try:
            return self._run(tokens, pooling, repeat)
        finally:
            self._current = None

    def _skippable(self, forward: Any) -> Any:
        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return hidden_states if self._current is not None else forward(hidden_states, *args, **kwargs)

        return run

    def _enter(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        positional = bool(args)
        states = args[0] if positional else kwargs["hidden_states"]
        if self._current is None:
            self._captured = states.detach()
            return None
        filled = torch.zeros_like(states)
        for row, key in zip(filled, self._current, strict=True):
            row[: len(key)] = self.known[key]
        return ((filled, *args[1:]), kwargs) if positional else (args, {**kwargs, "hidden_states": filled})
