"""The base class of designs for private texts, and their registry. A new design needs one new file only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from blindtune.checks import check_positive, check_weights
from blindtune.errors import ConfigError, NonFiniteTensor
from blindtune.models.cut.parts import Part, PartName, pack
from blindtune.privacy.decorrelation import decorrelation
from blindtune.privacy.randomness import SecureGenerator
from blindtune.privacy.token_noise import add_token_noise, row_mu
from blindtune.texts.activation_store import ActivationStore
from blindtune.texts.boundary import Boundary, Trunk
from blindtune.texts.ends import Ends
from blindtune.texts.model import CausalBatch, CutCausalLM
from blindtune.wire import Codec
from blindtune.wire.schema import CODECS

D = TypeVar("D", bound="type[Design]")
DESIGNS: dict[str, type[Design]] = {}
"""Registered designs by name, in the order of their definition."""


def design(cls: D) -> D:
    """Class decorator that registers a design under its `name`, for `make_design`, the command line and checkpoints."""
    DESIGNS[cls.name] = cls
    return cls


@dataclass
class Design:
    """Defines how the ends are trained, and what a step sends.

    Args:
        up, down: codecs of the tensors that are sent and received: fp32, fp16, int8 or int4.
        clip_norm, noise: with noise > 0, every token's hidden state is clipped to `clip_norm`, and Gaussian noise of
            standard deviation noise · clip_norm is added to each value, anew in each message.
    Raises:
        ConfigError: there is no such codec, or a number is out of range.
    """

    up: Codec = "int8"
    down: Codec = "int8"
    clip_norm: float = 1.0
    noise: float = 0.0

    name: ClassVar[str]
    """Name on the command line and in checkpoints."""
    emulated: ClassVar[bool] = False
    """Whether training uses an emulator instead of the provider's trunk, so that nothing is sent."""

    def __post_init__(self) -> None:
        for codec in (self.up, self.down):
            if codec not in CODECS:
                raise ConfigError(f"There is no codec {codec!r}.", remedy=f"Use one of: {', '.join(CODECS)}.")
        check_weights(noise=self.noise)
        check_positive(clip_norm=self.clip_norm)

    @property
    def parts(self) -> tuple[PartName, ...]:
        """The parts that are trained; `trunk` stands for an emulator's blocks."""
        return ("bottom", "top")

    @property
    def stores_activations(self) -> bool:
        """Whether s_B of a text is stored and not requested again, because the bottom is frozen."""
        return False

    def views(self, epochs: int) -> int:
        """Returns the number of messages in which a text's hidden states are sent, over `epochs` epochs."""
        return epochs

    def encoder(self, bottom: Part) -> Callable[[Tensor], Tensor] | None:
        """Returns a function from tokens to the tokens that are sent instead; None if tokens aren't changed."""
        return None

    def perturb(self, smashed: Tensor, generator: SecureGenerator) -> Tensor:
        """Returns s_A `[N, d]` as it is sent, before the codec."""
        if not self.noise:
            return smashed
        return add_token_noise(smashed, self.clip_norm, self.noise, generator=generator)

    def boundary(
        self, trunk: Trunk, bottom: Part, *, store: ActivationStore | None = None, key: bytes | None = None
    ) -> Boundary:
        """Returns the boundary of a client that follows this design. See `Boundary` for the arguments."""
        encode = self.encoder(bottom)
        return Boundary(trunk, perturb=self.perturb, encode=encode, store=store, key=key)

    def step(self, model: CutCausalLM, ends: Ends, batch: CausalBatch, generator: torch.Generator) -> dict[str, float]:
        """Computes the gradients of the ends' parameters, and returns the terms of the loss by name.

        Args:
            generator: public random generator for this step.
        Raises:
            NonFiniteTensor: the loss is NaN or infinite.
        """
        raise NotImplementedError

    def exposure(self, epochs: int) -> str:
        """Describes in words what the server will be able to see.

        Args:
            epochs: number of times that a text is sent, if it is sent in each step whose batch it is in.
        """
        raise NotImplementedError

    def _hidden_states_seen(self, epochs: int) -> str:
        views = self.views(epochs)
        seen = f"sees every token's hidden state ({self.up} up, {self.down} down)"
        if not self.noise:
            return seen
        return (
            f"{seen}, clipped, with noise of {self.noise:g} clipping norms on each value "
            f"(μ = {row_mu(self.noise, views):.2f} for one row of a text, after {views} messages)"
        )


@dataclass
class BothEnds(Design):
    """Base class of designs that train both ends with one backward pass through the ends and the trunk or emulator.

    Args:
        decorrelation_weight: weight λ of the penalty λ · dCor(e, s_A); 0 for none.
    """

    decorrelation_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(decorrelation_weight=self.decorrelation_weight)

    def step(self, model: CutCausalLM, ends: Ends, batch: CausalBatch, generator: torch.Generator) -> dict[str, float]:
        smashed = model.smash(batch)
        task = model.losses(model.through(smashed, batch), batch).mean()
        parts, total = {"task": task}, task
        if self.decorrelation_weight:
            parts["dcor"] = decorrelation(model.embedded(batch), pack(smashed, batch.lengths), generator)
            total = task + self.decorrelation_weight * parts["dcor"]
        check_loss(total)
        total.backward()
        return {name: float(value.detach()) for name, value in parts.items()}


def check_loss(loss: Tensor) -> None:
    """Raises `NonFiniteTensor` if the loss is NaN or infinite, before a gradient is sent."""
    if not bool(torch.isfinite(loss)):
        raise NonFiniteTensor(
            f"The loss is {float(loss.detach())}; no gradient was sent for it.", remedy="Lower the learning rate."
        )


def make_design(name: str, options: Mapping[str, Any]) -> Design:
    """Creates the design with this name. Raises `ConfigError` if the name or an option is unknown."""
    if name not in DESIGNS:
        raise ConfigError(f"There is no design {name!r}.", remedy=f"Use one of: {', '.join(DESIGNS)}.")
    known = {option.name for option in fields(DESIGNS[name])}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ConfigError(
            f"{name} has no option {unknown[0]!r}.", remedy=f"It has: {', '.join(sorted(known))} (--set name=value)."
        )
    return DESIGNS[name](**options)


def design_options(made: Design) -> dict[str, Any]:
    """Returns the options of a design, as `make_design` accepts them."""
    return asdict(made)
