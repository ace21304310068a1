"""P3EFT (the paper's Algorithm 2): n adapters mixed by secret weights, gradients in shares, and an adversary.

    h_i  = h(x, θ_i)                       from an operator
    h'   = Σ_i W_i ⊙ h_i                   eq. 3, W secret
    L    = task(head(h'), y) + Σ_i adversary(h_i, y)
    ∂L/∂θ_i by private backpropagation     Algorithm 1, one share for each operator

Each operator that takes part sees all adapters, unless there are m · n operators or more: then each adapter has its own
operators. There is no bound on what adapters reveal; the audit measures it. With `blindtune.labels.methods.padded_lora`
one operator learns no more than a stated bound.

`RECIPES` has the settings of the authors' code of 2023 and of 2025, as far as they are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from blindtune.checks import check_counts, check_positive, check_switches, check_weights
from blindtune.client import Backbone
from blindtune.errors import ConfigError
from blindtune.files import under
from blindtune.labels.channels.private_backprop import PrivateBackpropOptions
from blindtune.labels.methods.base import AdapterMethod, method
from blindtune.privacy.adversary import Adversary, Fit, Form, stack_channels
from blindtune.privacy.mixing import mix, mixing_weights
from blindtune.privacy.randomness import SecureGenerator

_FROM_RECIPE: Any = None
"""Default of the options that a recipe can set. `P3EFT` replaces it by the recipe's value, or by its own."""


@dataclass(frozen=True)
class Recipe:
    """Settings of a published implementation.

    Attributes:
        options: options of `P3EFT`.
        head: name of the head (`blindtune.labels.HEADS`).
        training: options of `TrainConfig`. With `learning_rate`, the head has the adapters' rate.
    """

    options: Mapping[str, Any]
    head: str = "linear"
    training: Mapping[str, Any] = field(default_factory=dict[str, Any])


OWN = Recipe(
    {
        "centre": True,
        "mixing_scale": 5.0,
        "regularizer": "confusion",
        "activation_weight": 0.3,
        "shift_weight": 0.0,
        "adversary_fit": "buffer",
        "buffer": 20,
        "adversary_l2": 100.0,
    }
)
"""What P3EFT does without a recipe."""
_AUTHORS = {"regularizer": "flip", "adversary_fit": "batch", "buffer": 1, "adversary_l2": 1.0}
_AUTHORS_TRAINING = {"weight_decay": 0.01, "max_grad_norm": 1.0}
RECIPES: dict[int, Recipe] = {
    2023: Recipe(
        {**_AUTHORS, "centre": False, "mixing_scale": 31.0, "activation_weight": 0.31, "shift_weight": 0.31},
        head="mlp",
        training={**_AUTHORS_TRAINING, "learning_rate": 3e-3},
    ),
    2025: Recipe(
        {**_AUTHORS, "centre": True, "mixing_scale": 1.0, "shift_weight": 0.0},
        head="pooler",
        training={**_AUTHORS_TRAINING, "learning_rate": 1e-3},
    ),
}
"""Recipes by year. The learning rates are ours: the authors' (6e-5 to 2e-4) are for larger models. That of 2023 was
chosen of two on validation texts (MiniLM, SST-2, one seed), that of 2025 wasn't chosen."""


@method
@dataclass
class P3EFT(AdapterMethod):
    """Trains n adapters mixed by secret weights, with gradient shares and an adversary: the paper's Algorithm 2.

    Options that are None take the recipe's value. Those that it doesn't set, and all without a recipe, take the value
    in brackets. A method that was made has no None there.

    Args:
        backprop: options for sending gradients, see `PrivateBackpropOptions`. Default: two shares.
        n: number of adapters.
        recipe: 2023 or 2025 for the settings of the authors' code of that year. It sets the other options, and on the
            command line also the head, the learning rates, weight decay and clipping.
        centre: whether the mean of the mixing weights is 1/n (eq. 4); otherwise it is 0 [true].
        mixing_scale: standard deviation of the secret mixing weights. The larger it is, the less each adapter needs to
            change [5].
        regularizer: loss with which the adversary trains the adapters: confusion, flip (the authors') or reversal
            [confusion].
        activation_weight, shift_weight: the adversary's weights in the loss. The paper uses activations only [0.3, 0].
        joint_weight: weight of one more adversary, on the concatenated shifts of all n adapters, which is what one
            operator sees. Adapters that each reveal nothing may reveal labels together.
        adversary_fit: what the adversary is fitted on: buffer (recent batches, standardised), or batch (the authors':
            the current batch alone, raw features, from scratch) [buffer].
        buffer: number of recent batches that the adversary is fitted on; not used by the fit batch [20].
        adversary_l2: penalty on the adversary's weights, relative to the loss of one example (the authors: 1) [100].
        steps: number of steps of the run.
        rise: fraction of the run over which the adversaries' weights grow linearly from 0.
    Raises:
        ConfigError: n < 2, an unknown recipe, regularizer or fit, an option that is out of range, or one that differs
            from what the recipe sets.
    """

    backprop: PrivateBackpropOptions = field(default_factory=lambda: PrivateBackpropOptions(m=2))
    n: int = 2
    mixing_scale: float = _FROM_RECIPE
    regularizer: Form = _FROM_RECIPE
    activation_weight: float = _FROM_RECIPE
    shift_weight: float = _FROM_RECIPE
    joint_weight: float = 0.0
    buffer: int = _FROM_RECIPE
    adversary_l2: float = _FROM_RECIPE
    steps: int = 1000
    rise: float = 0.0
    recipe: int | None = None
    centre: bool = _FROM_RECIPE
    adversary_fit: Fit = _FROM_RECIPE

    name: ClassVar[str] = "p3eft"
    title: ClassVar[str] = "P3EFT"
    default_lr: ClassVar[float] = 5e-4  # lower, because large mixing weights amplify what each adapter changes
    mixing: Tensor = field(init=False, repr=False, compare=False)
    """Secret mixing weights, `(n, d)`."""

    def __post_init__(self) -> None:
        self._follow_recipe()
        check_counts(n=self.n, buffer=self.buffer, steps=self.steps)
        check_positive(mixing_scale=self.mixing_scale, adversary_l2=self.adversary_l2)
        check_weights(
            activation_weight=self.activation_weight,
            shift_weight=self.shift_weight,
            joint_weight=self.joint_weight,
            rise=self.rise,
        )
        check_switches(centre=self.centre)
        if self.n < 2:
            raise ConfigError(
                f"n = {self.n}: P3EFT mixes at least two adapters.", remedy="Use n=2, or the method lora."
            )
        if self.regularizer not in get_args(Form):
            raise ConfigError(
                f"There is no regularizer {self.regularizer!r}.", remedy=f"Use one of: {', '.join(get_args(Form))}."
            )
        if self.adversary_fit not in get_args(Fit):
            raise ConfigError(
                f"There is no adversary_fit {self.adversary_fit!r}.", remedy=f"Use one of: {', '.join(get_args(Fit))}."
            )
        self._adversary: Adversary | None = None
        self._joint: Adversary | None = None
        self._step = 0

    def _follow_recipe(self) -> None:
        """Fills in the options without a value. Raises `ConfigError` if one differs from what the recipe sets."""
        if self.recipe is not None and self.recipe not in RECIPES:
            raise ConfigError(
                f"There is no recipe {self.recipe!r}.", remedy=f"Use one of: {', '.join(map(str, RECIPES))}."
            )
        recipe = OWN.options if self.recipe is None else RECIPES[self.recipe].options
        for name, own in OWN.options.items():
            given = getattr(self, name)
            if given is _FROM_RECIPE:
                setattr(self, name, recipe.get(name, own))
            elif self.recipe is not None and name in recipe and given != recipe[name]:
                raise ConfigError(
                    f"recipe = {self.recipe} sets {name} = {recipe[name]!r}, not {given!r}.",
                    remedy=f"Leave out {name}, or give all options yourself, without a recipe.",
                )

    @property
    def mixes_equal_to_zero(self) -> bool:
        return not self.centre

    @property
    def default_head(self) -> str:
        return OWN.head if self.recipe is None else RECIPES[self.recipe].head

    def complete_training(self, given: Mapping[str, Any]) -> dict[str, Any]:
        recipe = OWN if self.recipe is None else RECIPES[self.recipe]
        completed = super().complete_training({**recipe.training, **given})
        if "learning_rate" in recipe.training:
            completed.setdefault("head_learning_rate", completed["learning_rate"])
        return completed

    @property
    def num_adapters(self) -> int:
        return self.n

    @property
    def needs_frozen(self) -> bool:
        return self.shift_weight > 0 or self.joint_weight > 0

    @property
    def defence(self) -> str | None:
        return "the adversary" if self.activation_weight > 0 or self.needs_frozen else None

    def attach(self, backbone: Backbone, classes: int, generator: SecureGenerator) -> None:
        super().attach(backbone, classes, generator)
        dim = backbone.hidden_size
        secret = generator.derive(b"mixing")
        self.mixing = mixing_weights(self.n, dim, self.mixing_scale, generator=secret, centre=self.centre)
        weighted = [self.activation_weight > 0, self.shift_weight > 0]
        if any(weighted):
            self._adversary = self._make_adversary(self.n * sum(weighted), dim, classes)
        if self.joint_weight > 0:
            self._joint = self._make_adversary(1, self.n * dim, classes)

    def _make_adversary(self, channels: int, dim: int, classes: int) -> Adversary:
        return Adversary(
            channels, dim, classes, self.regularizer, self.buffer, l2=self.adversary_l2, fit=self.adversary_fit
        )

    def mix(self, hidden: Tensor) -> Tensor:
        return mix(hidden, self.mixing)

    def penalties(self, hidden: Tensor, frozen: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
        penalties: dict[str, Tensor] = {}
        shifts = hidden if frozen is None else hidden - frozen
        self._step += 1
        warmup = min(1.0, self._step / max(1.0, self.rise * self.steps))
        if self._adversary is not None:
            pairs = [(self.activation_weight, hidden), (self.shift_weight, shifts)]
            channels = [(weight, channel) for weight, channel in pairs if weight > 0]
            losses = self._adversary.penalty(stack_channels([channel for _, channel in channels]), labels)
            weights = losses.new_tensor([weight for weight, _ in channels for _ in range(self.n)])
            penalties["adversary"] = warmup * (weights * losses).sum()
        if self._joint is not None:
            together = shifts.transpose(0, 1).flatten(1).unsqueeze(0)  # (1, B, n · d)
            penalties["joint"] = warmup * self.joint_weight * self._joint.penalty(together, labels).sum()
        return penalties

    def state_dict(self) -> dict[str, Tensor]:
        state = self.inference_state_dict()
        if self._adversary is not None:
            state |= {f"adversary.{name}": tensor for name, tensor in self._adversary.state_dict().items()}
        if self._joint is not None:
            state |= {f"joint_adversary.{name}": tensor for name, tensor in self._joint.state_dict().items()}
        return state

    def inference_state_dict(self) -> dict[str, Tensor]:
        return {"mixing": self.mixing, "step": torch.tensor(self._step)}

    def step_state_dict(self) -> dict[str, Tensor]:
        return self.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.mixing = state["mixing"]
        self._step = int(state["step"])
        adversary = under("adversary.", state)
        if adversary and self._adversary is not None:
            self._adversary.load_state_dict(adversary)
        joint = under("joint_adversary.", state)
        if joint and self._joint is not None:
            self._joint.load_state_dict(joint)
