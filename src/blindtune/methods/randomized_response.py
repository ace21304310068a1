"""Label differential privacy: plain LoRA on randomised labels (Warner 1965; Ghazi et al. 2021, without priors).

    ỹ = y with probability e^ε / (e^ε + K − 1), else another class; drawn once for each example
    L = task(head(h), ỹ)

Everything that leaves the client is computed from texts and ỹ, so ε bounds what all operators together learn about one
label, from all messages of the run: gradients, adapters, activations. The model predicts what ỹ taught it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from blindtune.client import Backbone
from blindtune.errors import ConfigError
from blindtune.methods.lora import LoRA
from blindtune.methods.options import is_number
from blindtune.methods.state import under
from blindtune.models.tokenizer import TokenRow
from blindtune.privacy.accountant import PureAccountant
from blindtune.privacy.randomized_response import NAME_BYTES, LabelRandomizer
from blindtune.privacy.randomness import SecureGenerator


@dataclass
class RandomizedResponse(LoRA):
    """One adapter and a head, both trained on labels that are randomised once for each text.

    An example is its tokens: texts that are equal after truncation count as one, with the first label that it came
    with. ε is that of one run and key; another run on the same data draws anew, and their ε add up.

    Labels are randomised where the model gets them (`model(texts, labels=…)`, `model.prepare`). ε does not cover what a
    loop of yours derives from true labels and lets adapters feel: a loss made from logits outside the model, class
    weights, a head that was fitted before, clipping by a norm over all gradients, the choice of a checkpoint.

    Args:
        m, clip_norm, noise_ratio, max_mu, allow_single_operator: gradient shares, see `LoRA`; in the clear by default.
        adapter_noise: noise on the adapters that travel, see `LoRA`.
        epsilon: ε of one label.
    Raises:
        ConfigError: ε that isn't positive and finite.
    """

    epsilon: float = 1.0

    name: ClassVar[str] = "randomized_response"
    randomizer: LabelRandomizer = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.epsilon) or self.epsilon <= 0:
            raise ConfigError(
                f"epsilon = {self.epsilon!r} can't randomise labels.",
                remedy="Use a positive number such as 1.0; without randomisation, use the method lora.",
            )

    @property
    def learned(self) -> str:
        return f"only labels that were randomised with epsilon {self.epsilon:g}, delta 0"

    @property
    def label_mu(self) -> float:
        return PureAccountant(float(self.epsilon)).mu

    @property
    def watches_batches(self) -> bool:
        return True

    def attach(self, backbone: Backbone, classes: int, generator: SecureGenerator) -> None:
        super().attach(backbone, classes, generator)
        if classes < 2:
            raise ConfigError(
                f"The head has {classes} output.", remedy="Give it one for each class: two for a yes or no."
            )
        self.randomizer = LabelRandomizer(self.epsilon, classes, generator.derive(b"randomized response"))

    def adapter_labels(self, rows: Sequence[TokenRow], labels: Tensor) -> Tensor:
        return self.randomizer.labels([_name(row) for row in rows], labels)

    def report(self) -> dict[str, float]:
        label = PureAccountant(float(self.epsilon)).guarantee()
        return {**super().report(), "label_epsilon": label.epsilon, "label_auc_bound": label.auc_bound}

    def state(self) -> dict[str, Tensor]:
        """What was drawn. It isn't part of `snapshot`: a step that is undone may have been sent."""
        drawn = {f"randomized.{name}": tensor for name, tensor in self.randomizer.state().items()}
        return {**super().state(), **drawn}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        drawn = under("randomized.", state)
        if drawn:
            self.randomizer.load_state(drawn)


def _name(row: TokenRow) -> bytes:
    return hashlib.sha256(repr((row.ids, row.types)).encode()).digest()[:NAME_BYTES]
