"""Gradfree: trains the top on the trunk's outputs for a frozen bottom. No gradient is sent.

With `zo` the bottom is trained too, by two-point estimates of its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from blindtune.checks import check_positive, check_switches
from blindtune.errors import ConfigError
from blindtune.models.cut.parts import Part, PartName
from blindtune.privacy.token_groups import token_groups
from blindtune.texts.designs.base import Design, check_loss, design
from blindtune.texts.ends import Ends
from blindtune.texts.model import CausalBatch, CutCausalLM


@design
@dataclass
class Gradfree(Design):
    """Trains the top on the trunk's outputs for a frozen bottom, so that each example is sent once.

    Args:
        zo: whether to train the bottom's LoRA too, by two-point zeroth-order estimates (Spall 1992). Each step then
            sends two messages and receives two, as many bytes as Online, and still no gradient.
        zo_scale: ε of (L(θ + ε u) − L(θ − ε u)) / (2ε √P) · u, u ~ N(0, I_P). This is an estimate of the gradient,
            divided by √P so that its norm isn't larger than the gradient's. Adam doesn't depend on this factor, and
            when both ends are clipped together, the estimate doesn't dominate the top's gradient.
        anonymity: group size K > 1: each token is sent as the representative of a group of K tokens
            (`blindtune.privacy.token_groups`); 0 for none. Other designs don't offer it: a gradient would reveal the
            true tokens, since the loss is computed from them.
    Raises:
        ConfigError: an option is out of range, or `anonymity` and `zo` are combined.
    """

    zo: bool = False
    zo_scale: float = 1e-2
    anonymity: int = 0

    name: ClassVar[str] = "gradfree"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_switches(zo=self.zo)
        check_positive(zo_scale=self.zo_scale)
        if self.anonymity < 0 or self.anonymity == 1 or (self.anonymity and self.zo):
            raise ConfigError(
                f"anonymity = {self.anonymity}{' with zo' if self.zo else ''} isn't possible.",
                remedy="Use groups of at least 2 tokens, or 0 for none. With zo use 0: its messages depend on losses.",
            )

    @property
    def stores_activations(self) -> bool:
        return not self.zo

    @property
    def parts(self) -> tuple[PartName, ...]:
        return ("bottom", "top") if self.zo else ("top",)

    def views(self, epochs: int) -> int:
        return 2 * epochs if self.zo else 1

    def encoder(self, bottom: Part) -> Callable[[Tensor], Tensor] | None:
        if not self.anonymity:
            return None
        config = cast(Any, bottom.causal).config
        special = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
        fixed = {token for token in special if isinstance(token, int)}
        # computed on the CPU, so that the groups are equal on all devices
        sent = token_groups(bottom.embeddings().cpu(), self.anonymity, fixed=fixed)
        return lambda ids: sent.to(ids.device)[ids]

    def step(self, model: CutCausalLM, ends: Ends, batch: CausalBatch, generator: torch.Generator) -> dict[str, float]:
        if self.zo:
            return self._two_points(model, ends, batch, generator)
        task = model.losses(self.trunk_output(model, batch), batch).mean()
        check_loss(task)
        task.backward()
        return {"task": float(task.detach())}

    def trunk_output(self, model: CutCausalLM, batch: CausalBatch) -> Tensor:
        """Returns s_B `(B, L, d)` from the store, after fetching the rows that aren't in it.

        Raises:
            ConfigError: the boundary has no store.
            CacheFull: the missing rows don't fit in the store. Nothing is sent then.
        """
        store, rows = model.boundary.store, batch.rows()
        if store is None:
            raise ConfigError("Gradfree needs a store of hidden states.", remedy="Give the boundary a store.")
        missing = [row for row in dict.fromkeys(map(tuple, rows)) if row not in store]
        if missing:
            store.check_room(sum(len(row) for row in missing))
            with torch.no_grad():
                request = CausalBatch.of(missing, [1] * len(missing)).to(model.device)
                response = model.through(model.smash(request), request)
            for row, hidden in zip(missing, response, strict=True):
                store.put(row, hidden[: len(row)].cpu())
        return store.get(rows).to(model.device)

    def exposure(self, epochs: int) -> str:
        hidden = self._hidden_states_seen(epochs)
        if self.anonymity:
            hidden += f", but of each token only which group of {self.anonymity} it is in"
        return f"{hidden}, and no gradient" if self.zo else f"{hidden}, once for each text, and no gradient"

    def _two_points(
        self, model: CutCausalLM, ends: Ends, batch: CausalBatch, generator: torch.Generator
    ) -> dict[str, float]:
        parameters = ends.parameters("bottom")
        directions = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
        losses: list[float] = []
        for sign in (1.0, -1.0):
            with torch.no_grad(), _moved(parameters, directions, sign * self.zo_scale):
                output = model.through(model.smash(batch), batch)
            task = model.losses(output, batch).mean()
            check_loss(task)
            (task / 2).backward()  # the top's gradient is the mean over both points
            losses.append(float(task.detach()))
        count = sum(parameter.numel() for parameter in parameters)
        slope = (losses[0] - losses[1]) / (2 * self.zo_scale * math.sqrt(count))
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.grad = slope * direction
        return {"task": sum(losses) / 2}


@contextmanager
def _moved(parameters: list[torch.nn.Parameter], directions: list[Tensor], by: float) -> Generator[None]:
    """Adds `by` times the directions to the parameters within this context, and restores their exact values after."""
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter, direction in zip(parameters, directions, strict=True):
        parameter.add_(direction, alpha=by)
    try:
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
