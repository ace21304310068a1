"""P3EFT as published (Algorithm 2): n adapters, mixed by secret weights; gradients in shares; an adversary.

    h_i  = h(x, θ_i)                       from an operator
    h'   = Σ_i W_i ⊙ h_i                   eq. 3, W secret
    L    = task(head(h'), y) + Σ_i adversary(h_i, y)
    ∂L/∂θ_i by private backpropagation     Algorithm 1, one share for each operator

Every operator that takes part sees all adapters, unless there are m · n operators or more: then each adapter has its
own. The audit shows what they tell; under `blindtune.methods.p3eft` they tell nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, get_args

import torch
from torch import Tensor

from blindtune.client import Backbone
from blindtune.errors import ConfigError
from blindtune.methods.gradients import SharedGradients
from blindtune.methods.lora import LoRA
from blindtune.methods.options import check_counts, check_positive, check_weights
from blindtune.methods.state import under
from blindtune.privacy.adversary import Adversary, Form, stack_channels
from blindtune.privacy.mixing import mix, mixing_weights
from blindtune.privacy.randomness import SecureGenerator


@dataclass
class PublishedP3EFT(LoRA):
    """Label-private fine-tuning as in the paper, with its options.

    Args:
        n: adapters.
        m, clip_norm, noise_ratio, max_mu, allow_single_operator: gradient shares, see `LoRA`.
        adapter_noise: noise on the adapters that travel, see `LoRA`.
        mixing_scale: standard deviation of the secret mixing weights around 1/n. With a large one each adapter needs to
            change little.
        regularizer: what the adversary drives the adapters towards: confusion, flip (the authors') or reversal.
        activation_weight, shift_weight: the adversary's weights in the loss; the paper has activations only.
        joint_weight: weight of one more adversary, on the shifts of all n adapters side by side, which is what one
            operator sees. Adapters that each tell nothing may tell labels together.
        buffer: recent batches that the adversary is fitted on.
        adversary_l2: penalty on the adversary's weights, in units of one example (the authors: 1).
        steps, rise: these weights grow linearly over the first part `rise` of a run of `steps` steps.
    """

    m: int = 2
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

    name: ClassVar[str] = "p3eft_published"
    default_lr: ClassVar[float] = 5e-4  # adapters move their mixture by as much as the mixing weights are large
    channel: SharedGradients = field(init=False, repr=False)
    mixing: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
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
        self.shares = self.channel = self.make_shares(generator)
        backbone.channel = self.channel
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
        risen = min(1.0, self._step / max(1.0, self.rise * self.steps))
        if self._adversary is not None:
            pairs = [(self.activation_weight, hidden), (self.shift_weight, shifts)]
            channels = [(weight, channel) for weight, channel in pairs if weight > 0]
            losses = self._adversary.penalty(stack_channels([channel for _, channel in channels]), labels)
            weights = losses.new_tensor([weight for weight, _ in channels for _ in range(self.n)])
            penalties["adversary"] = risen * (weights * losses).sum()
        if self._joint is not None:
            together = shifts.transpose(0, 1).flatten(1).unsqueeze(0)  # (1, B, n · d)
            penalties["joint"] = risen * self.joint_weight * self._joint.penalty(together, labels).sum()
        return penalties

    def snapshot(self) -> dict[str, Tensor]:
        state = {"mixing": self.mixing, "step": torch.tensor(self._step)}
        if self._adversary is not None:
            state |= {f"adversary.{name}": tensor for name, tensor in self._adversary.state().items()}
        if self._joint is not None:
            state |= {f"joint_adversary.{name}": tensor for name, tensor in self._joint.state().items()}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self.mixing = state["mixing"]
        self._step = int(state["step"])
        adversary = under("adversary.", state)
        if adversary and self._adversary is not None:
            self._adversary.load_state(adversary)
        joint = under("joint_adversary.", state)
        if joint and self._joint is not None:
            self._joint.load_state(joint)
