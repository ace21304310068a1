"""Operators in this process, for experiments: the server's engine and recorder without the network between.

Methods, training, transcripts and audit are the real ones. Lower layers, which no adapter touches, are computed once
for each text and kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from blindtune.client import OperatorPool, Traffic, Upload
from blindtune.lattice import Lattice, expand_noise
from blindtune.models import FrozenBackbone, Tokenizer, Tokens
from blindtune.server.cache import ByteLRU
from blindtune.server.engine import Call, Engine, StoredAdapter
from blindtune.server.recorder import Recorder
from blindtune.wire import AdapterUpload, Limits, NoiseShare, decode

TENANT = "experiment"
NAME = "model"
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


@dataclass
class Place:
    """What an operator's transport is asked for, without a network."""

    url: str
    traffic: Traffic = field(default_factory=Traffic)

    def close(self) -> None:
        """Nothing is open."""


class LocalOperator:
    """An engine and a recorder behind the interface of `blindtune.client.Operator`. Operators share one backbone."""

    def __init__(self, backbone: FrozenBackbone, record: Path, lock: RLock) -> None:
        self.id = str(record)
        self.transport = Place(f"local:{record}")
        self.info = backbone.info(NAME, Limits())
        self._backbone, self._lock = backbone, lock
        self._adapters = ByteLRU[tuple[str, str], StoredAdapter](2**30, lambda _: None)
        self._engine = Engine(NAME, backbone, self._adapters, ByteLRU(2**31, lambda _: None))
        self._recorder = Recorder(record, self.id, {NAME: backbone})
        self._seen: set[str] = set()

    @property
    def name(self) -> str:
        return f"{self.transport.url} {self.id}"

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(
            self._backbone.tokenizer, pad_token_id=self.info.pad_token_id, with_types=self.info.token_type_ids
        )

    def forward(
        self,
        tokens: Tokens,
        uploads: tuple[Upload, ...],
        pooling: Any,
        seed: int | None,
        *,
        retain: bool = False,
        want_hidden: bool = True,
    ) -> Tensor | None:
        with self._lock:
            call = self._call(tokens, uploads, pooling, seed)
            hidden = self._engine.forward(call, retain=retain)
            self._recorder.forward(NAME, call, hidden if want_hidden else None)
            return hidden if want_hidden else None

    def backward(
        self,
        tokens: Tokens,
        uploads: tuple[Upload, ...],
        pooling: Any,
        seed: int | None,
        cotangents: Tensor | NoiseShare,
    ) -> Tensor:
        with self._lock:
            call = self._call(tokens, uploads, pooling, seed)
            if isinstance(cotangents, NoiseShare):
                shape = (1, len(uploads), len(tokens), self.info.hidden_size)
                lattice = Lattice(cotangents.exponent, cotangents.steps)
                cotangents = expand_noise(bytes.fromhex(cotangents.seed), shape, lattice)
            self._recorder.backward(NAME, call, cotangents)
            return self._engine.backward(call, cotangents)[0]

    def close(self) -> None:
        self._recorder.close()

    def _call(self, tokens: Tokens, uploads: tuple[Upload, ...], pooling: Any, seed: int | None) -> Call:
        for upload in uploads:
            self.transport.traffic.sent += len(upload.body) if upload.sha256 not in self._seen else 0
            if self._adapters.get((TENANT, upload.sha256)) is None:
                message, tensors = decode(upload.body, AdapterUpload)
                weights = tensors["weights"]
                stored = StoredAdapter(NAME, self._engine.layout(message.spec), weights)
                self._adapters.put((TENANT, upload.sha256), stored, weights.nbytes)
                if upload.sha256 not in self._seen:
                    self._recorder.adapter(TENANT, upload.sha256, message, weights)
                self._seen.add(upload.sha256)
        return Call(TENANT, [upload.sha256 for upload in uploads], pooling, seed, tokens)


def local_pool(backbone: FrozenBackbone, folders: list[Path]) -> OperatorPool:
    """One operator for each folder, where it records what it sees. `close_pool` writes the last of it."""
    lock = RLock()
    return OperatorPool([LocalOperator(backbone, folder, lock) for folder in folders])  # type: ignore[misc]


def close_pool(pool: OperatorPool) -> None:
    for operator in pool.operators:
        operator.close()  # type: ignore[attr-defined]
    pool.close()
