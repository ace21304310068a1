"""The designs of GuardedTuning: what one step computes, and what of it travels.

| design | trained | travels in a step |
|---|---|---|
| Online | bottom and top | s_A up, s_B down, g_B up, g_A down |
| Gradfree | top (`zo`: the bottom too, by two-point estimates) | s_A up, s_B down, once for each example; no gradient |
| Offline | bottom and top (`tune_emulator`: its blocks too), around an emulator of the trunk | nothing |
| Offsite | as Offline, without regularizer and quantization (Xiao et al. 2023) | nothing |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor

from blindtune.errors import ConfigError, NonFiniteTensor
from blindtune.methods.guarded.ends import Ends
from blindtune.methods.guarded.model import CausalBatch, SplitCausalLM
from blindtune.methods.guarded.smashed import SmashedStore
from blindtune.methods.options import check_positive, check_switches, check_weights
from blindtune.models.split import Part, PartName, pack
from blindtune.privacy.decorrelation import decorrelation
from blindtune.privacy.randomness import SecureGenerator
from blindtune.privacy.token_groups import token_groups
from blindtune.privacy.token_noise import add_token_noise
from blindtune.wire import Codec
from blindtune.wire.schema import CODECS


class Design(Protocol):
    """How the ends are trained."""

    name: ClassVar[str]
    emulated: ClassVar[bool]
    """Whether the middle is an emulator that is here, and not the provider's trunk."""

    @property
    def parts(self) -> tuple[PartName, ...]:
        """Which parts are trained; the trunk's stand-in, where it is one of them."""
        ...

    def codecs(self) -> tuple[Codec, Codec]:
        """Of what goes up and of what comes down."""
        ...

    def views(self, epochs: int) -> int:
        """In how many messages a text's hidden states leave, over so many epochs."""
        ...

    def encoder(self, bottom: Part) -> Callable[[Tensor], Tensor] | None:
        """Tokens to those that are sent in their places; None if texts are sent as they are."""
        ...

    def disturb(self, smashed: Tensor, generator: SecureGenerator) -> Tensor:
        """s_A `[N, d]` as it leaves."""
        ...

    def step(
        self, model: SplitCausalLM, ends: Ends, batch: CausalBatch, generator: torch.Generator
    ) -> dict[str, float]:
        """Leaves gradients in the ends' parameters; the losses by name."""
        ...


@dataclass
class _Guarded:
    """What Online, Gradfree and Offline share.

    Args:
        up, down: codecs of what is sent and of what comes back: fp32, fp16, int8 or int4.
        clip_norm, noise: with noise > 0, every token's hidden state is clipped to this norm and gets Gaussian noise of
            standard deviation noise · clip_norm on each value, anew in each message.
    Raises:
        ConfigError: no such codec, or a number that can't be.
    """

    up: Codec = "int8"
    down: Codec = "int8"
    clip_norm: float = 1.0
    noise: float = 0.0

    emulated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for codec in (self.up, self.down):
            if codec not in CODECS:
                raise ConfigError(f"There is no codec {codec!r}.", remedy=f"Use one of: {', '.join(CODECS)}.")
        check_weights(noise=self.noise)
        check_positive(clip_norm=self.clip_norm)

    @property
    def parts(self) -> tuple[PartName, ...]:
        return ("bottom", "top")

    def codecs(self) -> tuple[Codec, Codec]:
        return self.up, self.down

    def views(self, epochs: int) -> int:
        return epochs

    def encoder(self, bottom: Part) -> Callable[[Tensor], Tensor] | None:
        return None

    def disturb(self, smashed: Tensor, generator: SecureGenerator) -> Tensor:
        if not self.noise:
            return smashed
        return add_token_noise(smashed, self.clip_norm, self.noise, generator=generator)


@dataclass
class _BothEnds(_Guarded):
    """What Online and Offline share: one backward pass through both ends and what is between them.

    Args:
        decorrelation_weight: λ of λ · dCor(e, s_A); 0 for none.
    """

    decorrelation_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(decorrelation_weight=self.decorrelation_weight)

    def step(
        self, model: SplitCausalLM, ends: Ends, batch: CausalBatch, generator: torch.Generator
    ) -> dict[str, float]:
        smashed = model.smash(batch)
        task = model.losses(model.through(smashed, batch), batch).mean()
        parts, total = {"task": task}, task
        if self.decorrelation_weight:
            parts["dcor"] = decorrelation(model.embedded(batch), pack(smashed, batch.lengths), generator)
            total = task + self.decorrelation_weight * parts["dcor"]
        _check_loss(total)
        total.backward()
        return {name: float(value.detach()) for name, value in parts.items()}


@dataclass
class Online(_BothEnds):
    """Both ends are trained through the provider's trunk; plain split learning without decorrelation and noise."""

    name: ClassVar[str] = "guarded-online"


@dataclass
class Gradfree(_Guarded):
    """The top is trained on what the trunk makes of a frozen bottom: every example crosses the wire once.

    Args:
        zo: trains the bottom's LoRA too, by two-point zeroth-order estimates (Spall 1992): two messages up and down in
            every step, as many bytes as Online, and still no gradient on the wire.
        zo_scale: ε of (L(θ + ε u) − L(θ − ε u)) / (2ε √P) · u, u ~ N(0, I_P): an estimate of the gradient, divided by
            √P so that it is no larger than that. Adam doesn't mind, and where both ends are clipped together the top's
            gradient isn't lost beside it.
        anonymity: K > 1: each token is sent as one of a group of K (`blindtune.privacy.token_groups`). Only here: a
            gradient would tell the true tokens, since the loss is theirs.
    """

    zo: bool = False
    zo_scale: float = 1e-2
    anonymity: int = 0

    name: ClassVar[str] = "guarded-gradfree"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_switches(zo=self.zo)
        check_positive(zo_scale=self.zo_scale)
        if self.anonymity < 0 or self.anonymity == 1 or (self.anonymity and self.zo):
            raise ConfigError(
                f"anonymity = {self.anonymity}{', with zo' if self.zo else ''}.",
                remedy="Use groups of at least 2 tokens, or 0; not with zo, where what is sent follows from losses.",
            )
        self.store: SmashedStore | None = None
        """Where hidden states are kept; needed unless `zo`."""

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
        # on the CPU: equal groups, wherever the model runs
        sent = token_groups(bottom.embeddings().cpu(), self.anonymity, fixed=fixed)
        return lambda ids: sent.to(ids.device)[ids]

    def step(
        self, model: SplitCausalLM, ends: Ends, batch: CausalBatch, generator: torch.Generator
    ) -> dict[str, float]:
        if self.zo:
            return self._two_points(model, ends, batch, generator)
        task = model.losses(self.carried(model, batch), batch).mean()
        _check_loss(task)
        task.backward()
        return {"task": float(task.detach())}

    def carried(self, model: SplitCausalLM, batch: CausalBatch) -> Tensor:
        """s_B `(B, L, d)`: from the store, after fetching what isn't there."""
        rows = batch.rows()
        if self.store is None:
            raise ConfigError("Gradfree needs a store of hidden states.", remedy="Set design.store = SmashedStore(…).")
        missing = [row for row in dict.fromkeys(map(tuple, rows)) if row not in self.store]
        if missing:
            self.store.check_room(sum(len(row) for row in missing))
            with torch.no_grad():
                asked = CausalBatch.of(missing, [1] * len(missing)).to(model.device)
                came = model.through(model.smash(asked), asked)
            for row, hidden in zip(missing, came, strict=True):
                self.store.put(row, hidden[: len(row)].cpu())
        return self.store.get(rows).to(model.device)

    def _two_points(
        self, model: SplitCausalLM, ends: Ends, batch: CausalBatch, generator: torch.Generator
    ) -> dict[str, float]:
        parameters = ends.parameters("bottom")
        directions = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
        losses: list[float] = []
        for sign in (1.0, -1.0):
            with torch.no_grad(), _moved(parameters, directions, sign * self.zo_scale):
                carried = model.through(model.smash(batch), batch)
            task = model.losses(carried, batch).mean()
            _check_loss(task)
            (task / 2).backward()  # the top's gradient: the mean of both points
            losses.append(float(task.detach()))
        count = sum(parameter.numel() for parameter in parameters)
        slope = (losses[0] - losses[1]) / (2 * self.zo_scale * math.sqrt(count))
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.grad = slope * direction
        return {"task": sum(losses) / 2}


@dataclass
class Offline(_BothEnds):
    """Both ends are trained around an emulator that is here; nothing travels until the tuned ends do.

    Decorrelation is for those who will send texts through the real trunk later.

    Args:
        tune_emulator: LoRA on the emulator's blocks too; it is handed over with the ends, for the trunk's blocks that
            those stand for. What was learned on a thinned model goes into the whole one, as in LoRAM (Zhang et al.
            2025).
    """

    tune_emulator: bool = False

    name: ClassVar[str] = "guarded-offline"
    emulated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_switches(tune_emulator=self.tune_emulator)

    @property
    def parts(self) -> tuple[PartName, ...]:
        return ("bottom", "trunk", "top") if self.tune_emulator else ("bottom", "top")


@dataclass
class Offsite(Offline):
    """Offsite-Tuning itself: no regularizer, fp32 where anything travels."""

    up: Codec = "fp32"
    down: Codec = "fp32"

    name: ClassVar[str] = "offsite"

    def __post_init__(self) -> None:
        super().__post_init__()
        changed = self.decorrelation_weight or self.noise or self.tune_emulator
        if changed or (self.up, self.down) != ("fp32", "fp32"):
            raise ConfigError(
                "offsite is Offsite-Tuning as published: no regularizer, noise or quantization, tuned ends alone.",
                remedy="Use --method guarded-offline.",
            )


DESIGNS: dict[str, type[Online] | type[Gradfree] | type[Offline]] = {
    design.name: design for design in (Online, Gradfree, Offline, Offsite)
}


def make_design(name: str, options: dict[str, Any]) -> Online | Gradfree | Offline:
    """A design by name, with its options. Raises `ConfigError` for unknown ones."""
    if name not in DESIGNS:
        raise ConfigError(f"There is no design {name!r}.", remedy=f"Use one of: {', '.join(DESIGNS)}.")
    known = {option.name for option in fields(DESIGNS[name])}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ConfigError(
            f"{name} has no option {unknown[0]!r}.", remedy=f"It has: {', '.join(sorted(known))} (--set name=value)."
        )
    return DESIGNS[name](**options)


def _check_loss(loss: Tensor) -> None:
    if not bool(torch.isfinite(loss)):
        raise NonFiniteTensor(
            f"The loss is {float(loss.detach())}; no gradient was sent for it.", remedy="Lower the learning rate."
        )


@contextmanager
def _moved(parameters: list[torch.nn.Parameter], directions: list[Tensor], by: float) -> Generator[None]:
    """Parameters moved along the directions, and back to their very bits."""
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter, direction in zip(parameters, directions, strict=True):
        parameter.add_(direction, alpha=by)
    try:
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
