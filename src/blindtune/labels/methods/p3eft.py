"""P3EFT (the paper's Algorithm 2): n adapters mixed by secret weights, gradients in shares, and an adversary.

    h_i  = h(x, θ_i)                       from an operator
    h'   = Σ_i W_i ⊙ h_i                   eq. 3, W secret
    L    = task(head(h'), y) + Σ_i adversary(h_i, y)
    ∂L/∂θ_i by private backpropagation     Algorithm 1, one share for each operator

Each operator that takes part sees all adapters, unless there are m · n operators or more: then each adapter has its own
operators. There is no bound on what adapters reveal; the audit measures it. With `blindtune.labels.methods.padded_lora`
one operator learns no more than a stated bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, get_args

import torch
from torch import Tensor

from blindtune.checks import check_counts, check_positive, check_weights
from blindtune.client import Backbone
from blindtune.errors import ConfigError
from blindtune.files import under
from blindtune.labels.channels.private_backprop import PrivateBackpropOptions
from blindtune.labels.methods.base import AdapterMethod, method
from blindtune.privacy.adversary import Adversary, Form, stack_channels
from blindtune.privacy.mixing import mix, mixing_weights
from blindtune.privacy.randomness import SecureGenerator


@method
@dataclass
class P3EFT(AdapterMethod):
    """Trains n adapters mixed by secret weights, with gradient shares and an adversary: the paper's Algorithm 2.

    Args:
        backprop: options for sending gradients, see `PrivateBackpropOptions`. Default: two shares.
        n: number of adapters.
        mixing_scale: standard deviation of the secret mixing weights around 1/n. The larger it is, the less each
            adapter needs to change.
        regularizer: loss with which the adversary trains the adapters: confusion, flip (the authors') or reversal.
        activation_weight, shift_weight: the adversary's weights in the loss. The paper uses activations only.
        joint_weight: weight of one more adversary, on the concatenated shifts of all n adapters, which is what one
            operator sees. Adapters that each reveal nothing may reveal labels together.
        buffer: number of recent batches that the adversary is fitted on.
        adversary_l2: penalty on the adversary's weights, relative to the loss of one example (the authors: 1).
        steps: number of steps of the run.
        rise: fraction of the run over which the adversaries' weights grow linearly from 0.
    Raises:
        ConfigError: n < 2, an unknown regularizer, or an option that is out of range.
    """

    backprop: PrivateBackpropOptions = field(default_factory=lambda: PrivateBackpropOptions(m=2))
    n: int = 2
    mixing_scale: float = 5.0
    regularizer: Form = "confusion"
    activation_weight: float = 0.3
    shift_weight: float = 0.0
    joint_weight: float = 0.0
    buffer: int = 20
    adversary_l2: float = 100.0
    steps: int = 1000
    rise: float = 0.0

    name: ClassVar[str] = "p3eft"
    title: ClassVar[str] = "P3EFT"
    default_lr: ClassVar[float] = 5e-4  # lower, because large mixing weights amplify what each adapter changes
    mixing: Tensor = field(init=False, repr=False, compare=False)
    """Secret mixing weights, `(n, d)`."""

    def __post_init__(self) -> None:
        check_counts(n=self.n, buffer=self.buffer, steps=self.steps)
        check_positive(mixing_scale=self.mixing_scale, adversary_l2=self.adversary_l2)
        check_weights(
            activation_weight=self.activation_weight,
            shift_weight=self.shift_weight,
            joint_weight=self.joint_weight,
            rise=self.rise,
        )
        if self.n < 2:
            raise ConfigError(
                f"n = {self.n}: P3EFT mixes at least two adapters.", remedy="Use n=2, or the method lora."
            )
        if self.regularizer not in get_args(Form):
            raise ConfigError(
                f"There is no regularizer {self.regularizer!r}.", remedy=f"Use one of: {', '.join(get_args(Form))}."
            )
        self._adversary: Adversary | None = None
        self._joint: Adversary | None = None
        self._step = 0

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
        self.mixing = mixing_weights(self.n, dim, self.mixing_scale, generator=generator.derive(b"mixing"))
        weighted = [self.activation_weight > 0, self.shift_weight > 0]
        if any(weighted):
            self._adversary = self._make_adversary(self.n * sum(weighted), dim, classes)
        if self.joint_weight > 0:
            self._joint = self._make_adversary(1, self.n * dim, classes)

    def _make_adversary(self, channels: int, dim: int, classes: int) -> Adversary:
        return Adversary(channels, dim, classes, self.regularizer, self.buffer, l2=self.adversary_l2)

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
