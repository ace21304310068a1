"""A shadow client: what an adaptive attacker trains to know how a defended bottom computes.

The provider has the whole model, and knows the design, its options and how long clients train (Kerckhoffs): it tunes a
copy of the ends on public text in the same way, with a seed of its own. The client's weights and texts it doesn't have.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast

from blindtune.errors import ConfigError
from blindtune.methods.guarded import Ends, SplitCausalLM, make_design
from blindtune.models import Part, SplitModel
from blindtune.models.split import PartName
from blindtune.training.guarded import GuardedConfig, GuardedTrainer
from blindtune.training.questions import TokenizedQuestion


@dataclass(frozen=True)
class Recipe:
    """How a client tunes: what `blindtune.json` tells of a run, but for its data.

    Attributes:
        start: of the checkpoint that it started from.
    """

    method: str
    options: dict[str, Any]
    trained: Literal["lora", "full"] = "lora"
    rank: int = 16
    alpha: int = 32
    targets: list[str] | None = None
    training: GuardedConfig = field(default_factory=GuardedConfig)
    start: Recipe | None = None

    @staticmethod
    def of(summary: dict[str, Any]) -> Recipe:
        """From the JSON of a run.

        Raises:
            ConfigError: not one of a split model, or a start that nothing is known of.
        """
        try:
            training = {f.name: summary["training"][f.name] for f in fields(GuardedConfig)}
            return Recipe(
                summary["method"], summary["options"], summary["trained"], summary["rank"], summary["alpha"],
                summary["targets"], GuardedConfig(**training),
                _start_of(summary["start"]),
            )  # fmt: skip
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"blindtune.json isn't that of a split model's run: {error} is missing or wrong.",
                remedy="Give the folder that `blindtune train` wrote for this transcript.",
            ) from None

    def stages(self) -> list[Recipe]:
        """From the first start on."""
        return [*(self.start.stages() if self.start else []), self]

    @property
    def changes_bottom(self) -> bool:
        """Whether the bottom isn't the pretrained one when texts leave."""
        return any("bottom" in make_design(stage.method, stage.options).parts for stage in self.stages())


def _start_of(told: dict[str, Any] | None) -> Recipe | None:
    """None for the pretrained model."""
    if told is None:
        return None
    if not told:
        raise ConfigError(
            "The run started from a checkpoint that doesn't tell how it was made: it had no blindtune.json.",
            remedy="Leave out --run: without knowing the start, nobody can train a shadow client.",
        )
    return Recipe.of(told)


def shadow_bottom(
    split: SplitModel,
    recipe: Recipe,
    rows: Sequence[Sequence[int]],
    *,
    seed: int,
    progress: Callable[[str], None] = lambda _: None,
) -> Part:
    """The bottom of a shadow client, frozen.

    Args:
        split: the whole pretrained model, which stays as it is.
        rows: public texts as token rows; those with one token are left out.
    Raises:
        ConfigError: no text.
    """
    texts = [TokenizedQuestion((tuple(row),), (1,), (1,), 0) for row in rows if len(row) > 1]
    if not texts:
        raise ConfigError("A shadow client needs public text.", remedy="Give some, of at least two tokens each.")
    bottom, top = copy.deepcopy(split.parts["bottom"]), copy.deepcopy(split.parts["top"])
    for number, stage in enumerate(recipe.stages()):
        design = make_design(stage.method, stage.options)
        if "bottom" not in design.parts:
            continue
        bottom, top = (_merged(part) for part in (bottom, top))
        tuned: list[PartName] = [part for part in design.parts if part != "trunk"]  # the whole trunk is here
        ends = Ends(bottom, top, tuned, stage.trained, stage.rank, stage.alpha, stage.targets, seed=seed + number)
        count = stage.training.steps * stage.training.batch_size
        some = random.Random(f"{seed} {number}").sample(texts, min(count, len(texts)))
        config = GuardedConfig(**{**vars(stage.training), "seed": seed + number})
        trainer = GuardedTrainer(SplitCausalLM(bottom, top, split.parts["trunk"]), ends, design, some, config)
        for step in trainer.steps():
            if step.step % 25 == 0 or step.step == config.steps:
                losses = ", ".join(f"{name} {value:.3f}" for name, value in step.losses.items())
                progress(f"shadow client: step {step.step} of {config.steps}, {losses}")
    return bottom.requires_grad_(False)


def _merged(part: Part) -> Part:
    """Without LoRA modules: what they learned is in the weights."""
    for module in part.modules():
        for name, child in list(module.named_children()):
            if hasattr(child, "base_layer") and hasattr(child, "merge"):
                merged = cast(Any, child)
                merged.merge()
                setattr(module, name, merged.base_layer)
    return part
