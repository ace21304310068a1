"""A shadow client, which an adaptive attacker trains to approximate the bottom of a client that defends itself.

The provider has the whole model, and knows the design, its options and how long clients train (Kerckhoffs's principle).
It tunes a copy of the ends on public text in the same way, with a different seed. It doesn't have the client's weights
or texts.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from blindtune.audit.texts import Attacker, Exchange, Linked, link_repeats, through_codec
from blindtune.data.questions import TokenizedQuestion
from blindtune.errors import ConfigError
from blindtune.models import CutModel, Part
from blindtune.models.cut.parts import PartName
from blindtune.privacy.randomness import SecureGenerator
from blindtune.privacy.token_noise import clip_rows
from blindtune.texts.boundary import LocalTrunk
from blindtune.texts.designs import make_design
from blindtune.texts.ends import Ends
from blindtune.texts.model import CutCausalLM
from blindtune.texts.trainer import TrainConfig, Trainer
from blindtune.training.summary import TextsSummary, read_summary
from blindtune.wire import Codec

Say = Callable[[str], None]


def _silent(_: str) -> None:
    """Ignores a line of progress."""


class ShadowClient:
    """The adaptive attacker of an audit: it has a run's `blindtune.json`, and trains on public text instead of the
    run's data.

    Args:
        summary: the run's summary, or the run's folder. Only `blindtune.json` is read from the folder.
    Raises:
        CheckpointError: there is no summary, or it is that of a run with private labels.
        ConfigError: the summary doesn't contain the training's options, or the run started from a checkpoint without a
            summary.
    """

    def __init__(self, summary: TextsSummary | str | Path) -> None:
        read = summary if isinstance(summary, TextsSummary) else read_summary(summary, TextsSummary)
        self.stages = _stages(read)
        """Summaries of the run and of the runs that it started from, the earliest first."""
        self.design = make_design(read.method, read.options)
        """Design of the run."""

    @property
    def changes_bottom(self) -> bool:
        """Whether any of the runs trained the bottom."""
        return any("bottom" in make_design(stage.method, stage.options).parts for stage in self.stages)

    def link(self, exchanges: Sequence[Exchange]) -> Linked:
        """Averages the messages of each text, if they differ by fresh noise only."""
        if not self.design.noise:
            return Linked(list(exchanges), 1)
        return link_repeats(exchanges, self.design.noise * self.design.clip_norm)

    def attacker(
        self,
        cut_model: CutModel,
        rows: list[list[int]],
        codec: Codec,
        *,
        copies: float = 1,
        seed: int = 0,
        say: Say = _silent,
    ) -> Attacker:
        """Returns an attacker with this client's bottom, who simulates token groups, clipping, noise and codec.

        Args:
            cut_model: the pretrained model.
            rows: public texts as token rows.
            codec: codec in which s_A was sent.
            copies: number of messages of each text, over which the noise was averaged.
            seed: seed of the shadow client's training and of the attacker.
            say: callback invoked with lines of progress.
        """
        design = self.design
        bottom = self.train(cut_model, rows, seed=seed, say=say) if self.changes_bottom else None

        def expected(hidden: Tensor) -> Tensor:
            return clip_rows(hidden, design.clip_norm) if design.noise else hidden

        def simulate(hidden: Tensor) -> Tensor:
            clean = expected(hidden)
            noise = design.perturb(hidden, SecureGenerator()) - clean
            return through_codec(codec, clean + noise / math.sqrt(copies))

        send = design.encoder(cut_model.parts["bottom"])
        return Attacker(cut_model, rows, bottom=bottom, send=send, simulate=simulate, expected=expected, seed=seed)

    def train(self, cut_model: CutModel, rows: Sequence[Sequence[int]], *, seed: int, say: Say = _silent) -> Part:
        """Trains a client on public text, and returns its bottom, frozen.

        Args:
            cut_model: the whole pretrained model. It isn't changed.
            rows: public texts as token rows. Rows of one token are left out.
            seed: seed of LoRA's initial weights, of the choice of texts, and of training.
            say: callback invoked with lines of progress.
        Raises:
            ConfigError: there is no text with two tokens or more.
        """
        texts = [TokenizedQuestion((tuple(row),), (1,), (1,), 0) for row in rows if len(row) > 1]
        if not texts:
            raise ConfigError("A shadow client needs public text.", remedy="Give some, of at least two tokens each.")
        bottom, top = copy.deepcopy(cut_model.parts["bottom"]), copy.deepcopy(cut_model.parts["top"])
        trunk = LocalTrunk(cut_model.parts["trunk"])
        for number, stage in enumerate(self.stages):
            design = make_design(stage.method, stage.options)
            if "bottom" not in design.parts:
                continue
            bottom, top = _merged(bottom), _merged(top)
            tuned: list[PartName] = [
                part for part in design.parts if part != "trunk"
            ]  # frozen: the attacker has the real trunk
            ends = Ends(bottom, top, tuned, stage.tune, stage.rank, stage.alpha, stage.targets, seed=seed + number)
            config = _config(stage, seed + number)
            needed = min(config.steps * config.batch_size, len(texts))
            sample = random.Random(f"{seed} {number}").sample(texts, needed)
            model = CutCausalLM(bottom, top, design.boundary(trunk, bottom))
            for step in Trainer(model, ends, design, sample, config).steps():
                if step.step % 25 == 0 or step.step == config.steps:
                    losses = ", ".join(f"{name} {value:.3f}" for name, value in step.losses.items())
                    say(f"shadow client: step {step.step} of {config.steps}, {losses}")
        return bottom.requires_grad_(False)


def _stages(summary: TextsSummary) -> list[TextsSummary]:
    """Returns the summaries of the run and of the runs that it started from, the earliest first."""
    missing = sorted({f.name for f in fields(TrainConfig)} - set(summary.training))
    if missing:
        raise ConfigError(
            f"blindtune.json doesn't contain all options of the run's training: {missing[0]} is missing.",
            remedy="Give the folder that `blindtune texts train` wrote for this transcript.",
        )
    if summary.unknown_start:
        raise ConfigError(
            "The run started from a checkpoint that doesn't say how it was made: it had no blindtune.json.",
            remedy="Leave out --run: a shadow client has to start from the same weights.",
        )
    return [*(_stages(summary.start) if summary.start else []), summary]


def _config(stage: TextsSummary, seed: int) -> TrainConfig:
    known = {f.name for f in fields(TrainConfig)}
    options: dict[str, Any] = {name: value for name, value in stage.training.items() if name in known}
    options |= {"betas": tuple(options.get("betas", TrainConfig.betas)), "seed": seed}
    return TrainConfig(**options)


def _merged(part: Part) -> Part:
    """Merges the LoRA modules of a part into its weights, and removes them. The part is changed in place."""
    for module in part.modules():
        for name, child in list(module.named_children()):
            if hasattr(child, "base_layer") and hasattr(child, "merge"):
                merged = cast(Any, child)
                merged.merge()
                setattr(module, name, merged.base_layer)
    return part
