"""P3EFT (Algorithm 2): n adapters mixed by secret weights, gradients in shares, adapters trained to tell nothing.

    h_i  = h(x, θ_i)                       from an operator
    h'   = Σ_i W_i ⊙ h_i                   eq. 3, W secret
    L    = task(head(h'), y) + Σ_i regularizer(h_i, y)
    ∂L/∂θ_i by private backpropagation     Algorithm 1, one share for each operator

The regularizer has two parts: the paper's adversary, here on activations and on shifts, and decoys (see
`blindtune.privacy.decoys`), which are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

from blindtune.client import Backbone
from blindtune.errors import ConfigError
from blindtune.methods.gradients import SharedGradients
from blindtune.methods.options import is_number
from blindtune.models.tokenizer import TokenRow
from blindtune.privacy.accountant import auc_bound, epsilon
from blindtune.privacy.adversary import Adversary, Form, stack_channels
from blindtune.privacy.decoys import Decoys, decoy_functions, draw_decoys
from blindtune.privacy.mixing import mix, mixing_weights
from blindtune.privacy.randomness import SecureGenerator

REPORT_DELTA = 1e-5


@dataclass
class P3EFT:
    """Label-private fine-tuning.

    Args:
        n: adapters.
        m: gradient shares; as many operators that don't collude are needed.
        mixing_scale: standard deviation of the secret mixing weights around 1/n.
        clip_norm: bound C on one example's gradient at the hidden states of all adapters together.
        noise_ratio: σ / C. μ of the gradient channel is 2 √views / noise_ratio.
        regularizer: what the adversary drives the adapters towards: confusion, flip or reversal.
        activation_weight, shift_weight: the adversary's weights in the loss.
        joint_weight: weight of one more adversary, on the shifts of all n adapters side by side, which is what one
            operator sees. Adapters that each tell nothing may tell labels together.
        buffer: recent batches that the adversary is fitted on.
        decoys: label-independent functions for each adapter; 0 for the paper's method alone.
        shared_decoys: how many of them are the same functions for all adapters, so that the label is not the only
            thing that adapters have in common.
        decoy_saturation: how two-humped they are (factor inside a tanh); 0 for linear functions.
        decoy_weight: their weight in the loss.
        decoy_components: principal components of the frozen features that decoys are functions of.
        decoy_start, decoy_end: their amplitude grows from start to end over the run (with the power 0.8 of the
            step), in units of the frozen features' spread.
        steps: length of the run, for the schedules below and above.
        task_delay, task_rise: the task's loss begins after this part of the run and takes this part to reach its full
            weight: decoys must be there before the first trace of a label.
        anchor_weight: until then, the mixed output is held at the frozen model's with this weight.
        max_mu: budget for μ of the gradient channel; the run stops before the step that would exceed it.
        allow_single_operator: lets shares meet at one operator. Then there is no gradient privacy.
    """

    n: int = 2
    m: int = 2
    mixing_scale: float = 1.0
    clip_norm: float = 10.0
    noise_ratio: float = 100.0
    regularizer: Form = "confusion"
    activation_weight: float = 0.0
    shift_weight: float = 0.0
    joint_weight: float = 0.0
    buffer: int = 20
    decoys: int = 3
    shared_decoys: int = 2
    decoy_saturation: float = 1.5
    decoy_weight: float = 20.0
    decoy_components: int = 10
    decoy_start: float = 0.12
    decoy_end: float = 0.5
    steps: int = 150
    task_delay: float = 0.05
    task_rise: float = 0.17
    anchor_weight: float = 5.0
    max_mu: float | None = None
    allow_single_operator: bool = False

    name: ClassVar[str] = "p3eft"
    channel: SharedGradients = field(init=False, repr=False)
    mixing: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = {"n": self.n, "m": self.m, "buffer": self.buffer, "steps": self.steps}
        may_be_none = {"decoys": self.decoys, "shared_decoys": self.shared_decoys}
        for name, value in (counts | may_be_none).items():
            if type(value) is not int or value < (0 if name in may_be_none else 1):  # from a command line, say
                raise ConfigError(f"{name} = {value!r} is no count.", remedy="Use a whole number.")
        if self.n < 2:
            raise ConfigError(
                f"n = {self.n}: P3EFT mixes at least two adapters.", remedy="Use n=2, or the method lora."
            )
        if self.regularizer not in get_args(Form):
            raise ConfigError(
                f"There is no regularizer {self.regularizer!r}.", remedy=f"Use one of: {', '.join(get_args(Form))}."
            )
        if self.mixing_scale <= 0:
            raise ConfigError(f"mixing_scale = {self.mixing_scale} mixes nothing.", remedy="Use a positive number.")
        weights = [self.activation_weight, self.shift_weight, self.joint_weight, self.decoy_weight]
        if not all(is_number(weight) and weight >= 0 for weight in weights):
            raise ConfigError(
                f"Weights of the regularizer are {weights}.",
                remedy="Use numbers that aren't negative; 0 switches a part off.",
            )
        self.shared_decoys = min(self.shared_decoys, self.decoys)
        self._decoys: Decoys | None = None
        self._adversary: Adversary | None = None
        self._joint: Adversary | None = None
        self._step = 0

    @property
    def num_adapters(self) -> int:
        return self.n

    @property
    def needs_frozen(self) -> bool:
        return self.shift_weight > 0 or self.joint_weight > 0 or self.decoys > 0

    def attach(self, backbone: Backbone, classes: int, generator: SecureGenerator) -> None:
        self.channel = SharedGradients(
            self.m, self.clip_norm, self.noise_ratio, generator, self.allow_single_operator, self.max_mu
        )
        backbone.channel = self.channel
        self._generator = generator
        dim = backbone.hidden_size
        self.mixing = mixing_weights(self.n, dim, self.mixing_scale, generator=generator.derive(b"mixing"))
        weighted = [self.activation_weight > 0, self.shift_weight > 0]
        if any(weighted):
            self._adversary = Adversary(self.n * sum(weighted), dim, classes, form=self.regularizer, buffer=self.buffer)
        if self.joint_weight > 0:
            self._joint = Adversary(1, self.n * dim, classes, form=self.regularizer, buffer=self.buffer)

    def check(self, backbone: Backbone) -> None:
        self.channel.check_operators(len(backbone.pool), backbone.info.dtype)

    def prepare(self, frozen: Tensor, labels: Tensor) -> None:
        if self.decoys and self._decoys is None:
            generator = self._generator.derive(b"decoys")
            classes = len(labels.unique())
            try:
                self._decoys = draw_decoys(
                    frozen,
                    labels,
                    self.n,
                    self.decoys,
                    shared=self.shared_decoys,
                    saturation=self.decoy_saturation,
                    components=max(
                        self.decoy_components, decoy_functions(self.n, self.decoys, self.shared_decoys) + classes - 1
                    ),
                    generator=generator,
                )
            except ValueError as error:
                raise ConfigError(str(error), remedy="Use fewer decoys, or more texts.") from None

    def mix(self, hidden: Tensor) -> Tensor:
        mixed = mix(hidden, self.mixing)
        return mixed if self._decoys is None else self._decoys.remove(mixed, self.mixing)

    def penalties(self, hidden: Tensor, frozen: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
        penalties: dict[str, Tensor] = {}
        shifts = hidden if frozen is None else hidden - frozen
        if self.decoys:
            if self._decoys is None or frozen is None:
                raise ConfigError(
                    "P3EFT needs the training set's frozen features for its decoys.",
                    remedy="Call model.prepare(texts, labels) before training, or use P3EFT(decoys=0).",
                )
            done = min(1.0, (self._step + 1) / self.steps) ** 0.8
            amplitude = self.decoy_start + (self.decoy_end - self.decoy_start) * done
            penalties["decoys"] = self.decoy_weight * self._decoys.penalty(shifts, frozen, amplitude)
            waiting = 1.0 - self.task_weight()
            if waiting > 0 and self.anchor_weight > 0:
                still = self._decoys.remove(frozen, self.mixing)
                penalties["anchor"] = self.anchor_weight * waiting * self._decoys.distance(self.mix(hidden), still)
        if self._adversary is not None:
            pairs = [(self.activation_weight, hidden), (self.shift_weight, shifts)]
            channels = [(weight, channel) for weight, channel in pairs if weight > 0]
            losses = self._adversary.penalty(stack_channels([channel for _, channel in channels]), labels)
            weights = losses.new_tensor([weight for weight, _ in channels for _ in range(self.n)])
            penalties["adversary"] = (weights * losses).sum()
        if self._joint is not None:
            together = shifts.transpose(0, 1).flatten(1).unsqueeze(0)  # (1, B, n · d)
            penalties["joint"] = self.joint_weight * self._joint.penalty(together, labels).sum()
        self._step += 1
        return penalties

    def adapter_labels(self, rows: Sequence[TokenRow], labels: Tensor) -> Tensor:
        return labels

    @property
    def auxiliary(self) -> nn.Module | None:
        return None

    def task_weight(self) -> float:
        begun = self._step + 1 - self.task_delay * self.steps
        return min(1.0, max(0.0, begun / max(1.0, self.task_rise * self.steps)))

    def report(self) -> dict[str, float]:
        if self.allow_single_operator:
            return {}
        mu = self.channel.accountant.mu()
        return {
            "gradient_channel_mu": mu,
            "gradient_channel_epsilon": epsilon(mu, REPORT_DELTA),
            "gradient_channel_auc_bound": auc_bound(mu),
        }

    def state(self) -> dict[str, Tensor]:
        return {**self.snapshot(), "accountant": self.channel.accountant.state()}

    def snapshot(self) -> dict[str, Tensor]:
        state = {"mixing": self.mixing, "step": torch.tensor(self._step)}
        if self._decoys is not None:
            state |= {f"decoys.{name}": tensor for name, tensor in self._decoys.state().items()}
        if self._adversary is not None:
            state |= {f"adversary.{name}": tensor for name, tensor in self._adversary.state().items()}
        if self._joint is not None:
            state |= {f"joint_adversary.{name}": tensor for name, tensor in self._joint.state().items()}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.mixing = state["mixing"]
        self._step = int(state["step"])
        if "accountant" in state:
            self.channel.accountant.load_state(state["accountant"])
        decoys = _under("decoys.", state)
        if decoys:
            self._decoys = Decoys(**decoys)
        adversary = _under("adversary.", state)
        if adversary and self._adversary is not None:
            self._adversary.load_state(adversary)
        joint = _under("joint_adversary.", state)
        if joint and self._joint is not None:
            self._joint.load_state(joint)


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
