"""A run with padded adapters as its operators record it, simulated in this process on a tiny model.

In each step operator A receives p + δ and operator B receives p − δ, for a forward call each. The gradient's shares
come under the public adapter θ_0, which is the same at every step and changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from blindtune.audit import Row, View, read_view
from blindtune.lattice import Lattice
from blindtune.models import FrozenBackbone, LoraLayout, Tokenizer, Tokens
from blindtune.models.tokenizer import TokenRow
from blindtune.privacy.randomness import SecureGenerator
from blindtune.privacy.shares import split_gradient
from blindtune.server.engine import Call
from blindtune.server.recorder import Recorder
from blindtune.wire import AdapterUpload, LoraSpec, Pooling, Readout, Transcript

NAME = "tiny"
POOLING: Pooling = "mean"
BATCH, LENGTH = 24, 12
NORM = 1e-3
"""|δ| of a trained update."""


@dataclass
class Task:
    """Texts with random labels, and adapters on every layer whose A matrices are public."""

    backbone: FrozenBackbone
    texts: Sequence[str]
    size: int

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.backbone.tokenizer, pad_token_id=self.backbone.pad_token_id, with_types=True)

    @cached_property
    def rows(self) -> list[TokenRow]:
        different = {row.ids: row for row in self.tokenizer.rows(self.texts, max_length=LENGTH)}
        return list(different.values())[: self.size]

    @cached_property
    def truth(self) -> Tensor:
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(0))
        return torch.arange(self.size)[order] % 2

    @property
    def labels(self) -> dict[Row, int]:
        return {row.ids: int(label) for row, label in zip(self.rows, self.truth, strict=True)}

    @cached_property
    def spec(self) -> LoraSpec:
        return LoraSpec(modules=list(self.backbone.lora.shapes), rank=8, scaling=1.0)

    @cached_property
    def layout(self) -> LoraLayout:
        return LoraLayout(self.spec, self.backbone.lora.shapes)

    @cached_property
    def base(self) -> Tensor:
        """θ_0."""
        random = torch.Generator().manual_seed(1)
        shapes, rank = self.layout.shapes, self.spec.rank
        return self.layout.join(
            {
                name: (torch.randn(rank, inside, generator=random) / inside**0.5, torch.zeros(out, rank))
                for name, out, inside in shapes
            }
        )

    @cached_property
    def trained(self) -> Tensor:
        """One for each weight of a B matrix, zero for A."""
        return self.layout.join(
            {
                name: (torch.zeros(self.spec.rank, inside), torch.ones(out, self.spec.rank))
                for name, out, inside in self.layout.shapes
            }
        )

    @cached_property
    def direction(self) -> Tensor:
        """What the head reads, of length one."""
        vector = torch.randn(self.backbone.hidden_size, generator=torch.Generator().manual_seed(2))
        return vector / vector.norm()

    def batch(self, indices: Sequence[int]) -> Tokens:
        return self.tokenizer.pad([self.rows[index] for index in indices])

    def hidden(self, tokens: Tokens, weights: Tensor) -> Tensor:
        """h(x, θ): `(B, d)`."""
        return self.backbone.forward(tokens, POOLING, self.layout, weights.unsqueeze(0))[0]

    @cached_property
    def update(self) -> Tensor:
        """δ that moves hidden states along the head's direction, by a label's sign; |δ| = `NORM`."""
        tokens, sign = self.batch(range(self.size)), 2.0 * self.truth - 1.0
        target = 0.05 * sign.unsqueeze(1) * self.direction
        with torch.no_grad():
            frozen = self.hidden(tokens, self.base)
        delta = torch.zeros_like(self.base).requires_grad_()
        optimizer = torch.optim.Adam([delta], lr=3e-3)
        for _ in range(150):
            moved = self.hidden(tokens, self.base + delta * self.trained) - frozen
            loss = (moved - target).pow(2).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = delta.detach() * self.trained
        return NORM * found / found.norm()

    def residuals(self, indices: Sequence[int], generator: torch.Generator) -> Tensor:
        """p − y, of a head that knows little: `(B,)`."""
        return (0.3 + 0.4 * torch.rand(len(indices), generator=generator)) * (1.0 - 2.0 * self.truth[list(indices)])


def split(gradient: Tensor, m: int, sigma: float, generator: SecureGenerator) -> Tensor:
    """Shares `(m, n, B, d)` of a gradient, in noise of this standard deviation."""
    lattice = Lattice.for_sigma(sigma, terms=m - 1, largest=float(gradient.abs().max()))
    return split_gradient(lattice.round(gradient, generator), m, lattice, generator=generator).shares


def slowly(update: Tensor, steps: int) -> list[Tensor]:
    """δ_t that grows from one half to all of δ."""
    return [update * (0.5 + 0.5 * step / (steps - 1)) for step in range(steps)]


def trained_by_sgd(task: Task, steps: int, rate: float) -> list[Tensor]:
    """δ_t by plain SGD, with gradients taken at θ_0."""
    random = torch.Generator().manual_seed(3)
    deltas = [torch.zeros_like(task.base)]
    for step in range(steps - 1):
        indices = indices_of(task, step)
        weights = task.base.clone().requires_grad_()
        cotangents = task.residuals(indices, random).unsqueeze(1) * task.direction
        (gradient,) = torch.autograd.grad(task.hidden(task.batch(indices), weights), weights, cotangents)
        deltas.append(deltas[-1] - rate * gradient * task.trained)
    return deltas


def indices_of(task: Task, step: int) -> range:
    """Batches in the same order in every epoch."""
    start = step * BATCH % task.size
    return range(start, start + BATCH)


def record(task: Task, folder: Path, deltas: Sequence[Tensor], sigma: float) -> list[View]:
    """The views of A and B on a run with these δ_t and pads of this standard deviation."""
    recorders = {name: Recorder(folder / name, name, {NAME: task.backbone}) for name in ("A", "B")}
    pads, random = torch.Generator().manual_seed(4), torch.Generator().manual_seed(3)
    shares = SecureGenerator(bytes(32))

    def upload(name: str, weights: Tensor) -> str:
        sha256 = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
        recorders[name].adapter("me", sha256, AdapterUpload(model=NAME, spec=task.spec), weights)
        return sha256

    for step, delta in enumerate(deltas):
        indices = indices_of(task, step)
        tokens = task.batch(indices)
        pad = sigma * torch.randn(task.base.shape, generator=pads)
        gradient = task.residuals(indices, random).unsqueeze(1) * task.direction
        parts = split(gradient.unsqueeze(0), 2, 100.0, shares)  # (2, 1, B, d)
        for sign, name in ((1, "A"), (-1, "B")):
            padded = task.base + (pad.double() + sign * delta.double()).float()
            call = Call("me", [upload(name, padded)], Readout(pooling=POOLING), None, tokens)
            with torch.no_grad():
                recorders[name].forward(NAME, call, task.hidden(tokens, padded).unsqueeze(0))
        bases: dict[str, Call] = {}
        for name, recorder in recorders.items():
            if step == 0:
                upload(name, task.base)
            base = hashlib.sha256(task.base.numpy().tobytes()).hexdigest()
            bases[name] = Call("me", [base], Readout(pooling=POOLING), None, tokens)
            with torch.no_grad():
                sent = task.hidden(tokens, task.base).unsqueeze(0) if name == "A" else None
            recorder.forward(NAME, bases[name], sent)
        for share, (name, recorder) in zip(parts, recorders.items(), strict=True):
            recorder.backward(NAME, bases[name], share.unsqueeze(0))
    for recorder in recorders.values():
        recorder.close()
    return [read_view(Transcript(folder / name), name) for name in recorders]
