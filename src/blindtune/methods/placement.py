"""Which operator takes part in which steps, and what that lets it learn: printed before training.

Shares of one gradient, and the two adapters under one pad, go to different operators. Where there are more operators
than one step needs, they take turns, so that none sees consecutive steps (P3EFT, section 3.2): consecutive adapters in
the clear tell the update between them, and so the gradient that shares hide (`blindtune.audit.labels.adam`). Turns
alone don't help: the change over two steps still holds the gradient of the one that an operator took part in
(docs/label-privacy.md has numbers). Noise on adapters (`adapter_noise`) does, and, for the first steps, random moments.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from blindtune.client import Channel
from blindtune.methods.gradients import SharedGradients
from blindtune.methods.lora import LoRA
from blindtune.methods.model import Method, PrivateModel
from blindtune.methods.pads import PaddedAdapters
from blindtune.privacy.accountant import gaussian_guarantee, mu_of

ENOUGH = 1000
"""Steps to look at: turns repeat long before."""


@dataclass(frozen=True)
class Part:
    """One operator's part in a run.

    Attributes:
        share: of all steps.
        consecutive: whether it ever takes part in two steps that follow each other.
        adapters: whether it gets adapters in any of them, and not a share of the gradient alone.
        predictions: whether it gets adapters where the client validates or predicts.
    """

    share: float
    consecutive: bool
    adapters: bool
    predictions: bool

    def __str__(self) -> str:
        if self.share == 0:
            return "in no training step"
        if self.share == 1:
            return "in every step, so in consecutive ones" if self.consecutive else "in the only step"
        turns = "some of them consecutive" if self.consecutive else "never in consecutive ones"
        return f"in {self.share:.0%} of the steps, {turns}"


def placement(channel: Channel, operators: int, steps: int) -> list[Part]:
    """The part of each of so many operators in a run of so many steps."""
    counted = range(min(steps, ENOUGH))
    chosen = [set(channel.choose(operators, step)) for step in counted]
    get = channel.holders if isinstance(channel, PaddedAdapters) else channel.choose
    holders = {operator for step in counted for operator in get(operators, step)}
    teams = {operator for team in channel.teams(operators) for operator in team}
    return [
        Part(
            sum(operator in step for step in chosen) / len(chosen),
            any(operator in now and operator in after for now, after in itertools.pairwise(chosen)),
            operator in holders,
            operator in teams,
        )
        for operator in range(operators)
    ]


def exposure(model: PrivateModel, steps: int, *, random_moments: float = 0.0) -> list[str]:
    """What each operator will see in a run of so many steps, and what it can learn from that: a line for each.

    It is read off the method and the operators; nothing is sent. What texts tell by themselves comes on top.

    Args:
        random_moments: size of random moments that the optimizer starts from, if it does
            (`blindtune.training.randomise_moments`).
    Raises:
        SingleOperator: padded adapters over one operator, unless that is allowed.
    """
    method, channel, operators = model.method, model.backbone.channel, model.backbone.pool.operators
    if method.num_adapters == 0:
        said = ["sees texts, each once: nothing about labels"] * len(operators)
    else:
        run = _Run(method, channel, len(operators), random_moments)
        said = [run.describe(part) for part in placement(channel, len(operators), steps)]
    return [f"operator {i}: {o.transport.url}  {text}" for i, (o, text) in enumerate(zip(operators, said, strict=True))]


@dataclass(frozen=True)
class _Run:
    """A run in words."""

    method: Method
    channel: Channel
    operators: int
    random_moments: float

    @property
    def shares(self) -> SharedGradients | None:
        """How gradients travel; None: in the clear."""
        channel = self.channel.shares if isinstance(self.channel, PaddedAdapters) else self.channel
        return channel if isinstance(channel, SharedGradients) else None

    @property
    def met(self) -> bool:
        """Whether everything that has to be kept apart goes to one operator; the user has allowed it."""
        return self.shares is not None and self.operators < self.shares.m

    def describe(self, part: Part) -> str:
        sees = ["texts"]
        if part.adapters and part.share:
            sees.append(self._adapters())
        if part.share:
            shares = "every share" if self.met else "one share of each gradient"
            sees.append("gradients" if self.shares is None else shares)
        later = part.predictions and not (part.adapters and part.share)
        after = f", {self._adapters()} where you validate or predict" if later else ""
        return f"sees {_listed(sees)}, {part}{after}: {self._learns(part)}"

    def _adapters(self) -> str:
        count = self.method.num_adapters
        if isinstance(self.channel, PaddedAdapters):
            return "both padded adapters" if self.met else "one adapter under a pad"
        if self.shares is not None and self.shares.apart(self.operators):
            return f"one of {count} adapters (always the same)"
        return f"all {count} adapters" if count > 1 else "the adapter"

    def _learns(self, part: Part) -> str:
        if not (part.share or part.predictions):
            return "nothing about labels"
        words = self.method if isinstance(self.method, LoRA) else LoRA()
        if part.share and (self.shares is None or self.met):
            return f"it can learn {words.learned} from gradients" + (": their shares meet here" if self.met else "")
        if isinstance(self.channel, PaddedAdapters):
            return self._bounded(self.channel)
        lets = f" as far as {words.defence} lets them" if words.defence else ""
        carried = f"activations and shifts carry {words.learned}{lets}"
        return f"{carried}; {self._updates(part, words)}" if part.share else carried

    def _updates(self, part: Part, words: LoRA) -> str:
        """What the adapters of different steps tell together."""
        noise = 0.0 if self.shares is None else self.shares.adapter_noise
        if noise > 0:
            return f"noise of {noise:g} on adapters hides what a step changed, if it is large enough"
        those = "the labels" if words.learned == "the labels" else "those labels"
        if not part.consecutive:
            return f"what adapters change between its steps holds their gradients (optimizer inversion), and so {those}"
        moments = "; not the first steps': random moments" if self.random_moments > 0 else ""
        return (
            f"consecutive adapters can tell each step's gradient (optimizer inversion), and so {those}, although "
            f"shares hide it{moments}"
        )

    def _bounded(self, channel: PaddedAdapters) -> str:
        """The bound, see `blindtune.privacy.accountant`."""
        guarantee = gaussian_guarantee(mu_of(channel.ledger.limit))
        return (
            f"all that it sees of the run is μ-differentially private in all labels with μ = {guarantee.mu:g}, so ε = "
            f"{guarantee.epsilon:.2g} at δ = {guarantee.delta:g}: no test of one label has an AUC above "
            f"{guarantee.auc_bound:.3f}"
        )


def _listed(things: list[str]) -> str:
    *others, last = things
    return f"{', '.join(others)}{',' if others[1:] else ''} and {last}" if others else last
