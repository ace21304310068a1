"""Label differential privacy: plain LoRA on randomised labels (Warner 1965; Ghazi et al. 2021, without priors).

    ỹ = y with probability e^ε / (e^ε + K − 1), else another class; drawn once for each example
    L = task(head(h), ỹ)

Everything that leaves the client is computed from texts and ỹ, so ε bounds what all operators together learn about one
label, from all messages of the run: gradients, adapters, activations. The head that predicts is trained on ỹ too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from blindtune.checks import is_number
from blindtune.client import Backbone
from blindtune.errors import ConfigError
from blindtune.files import under
from blindtune.labels.methods.base import AdapterMethod, method
from blindtune.models.tokenizer import TokenRow
from blindtune.privacy.accountant import PureAccountant
from blindtune.privacy.randomized_response import NAME_BYTES, LabelRandomizer
from blindtune.privacy.randomness import SecureGenerator


@method
@dataclass
class RandomizedResponse(AdapterMethod):
    """Trains one adapter and a head, both on labels that are randomised once for each text.

    An example is identified by its tokens: texts that are equal after truncation count as one example, with the label
    of the first. ε is that of one run and key; another run on the same data draws new labels, and their ε add up.

    Labels are randomised when the model receives them (`model(texts, labels=…)`, `model.prepare`). ε does not cover
    what your own training loop derives from true labels and what influences the adapters: a loss computed from logits
    outside the model, class weights, a head that was fitted before, clipping by a norm over all gradients, the choice
    of a checkpoint.

    Args:
        backprop: options for sending gradients, see `AdapterMethod`.
        epsilon: ε of one label.
    Raises:
        ConfigError: ε isn't positive and finite.
    """

    epsilon: float = 1.0

    name: ClassVar[str] = "randomized-response"
    title: ClassVar[str] = "randomised response"
    watches_batches: ClassVar[bool] = True
    randomizer: LabelRandomizer = field(init=False, repr=False, compare=False)
    """Draws the randomised labels and keeps them."""

    def __post_init__(self) -> None:
        if not is_number(self.epsilon) or self.epsilon <= 0:
            raise ConfigError(
                f"epsilon = {self.epsilon!r} can't randomise labels.",
                remedy="Use a positive number such as 1.0, or the method lora for no randomisation.",
            )

    @property
    def learned(self) -> str:
        return f"only labels that were randomised with epsilon {self.epsilon:g}, delta 0"

    @property
    def label_mu(self) -> float:
        return PureAccountant(float(self.epsilon)).mu

    def attach(self, backbone: Backbone, classes: int, generator: SecureGenerator) -> None:
        super().attach(backbone, classes, generator)
        if classes < 2:
            raise ConfigError(
                f"The head has {classes} output(s); randomised labels need two classes or more.",
                remedy="Give the head one for each class, so two for a binary label.",
            )
        self.randomizer = LabelRandomizer(self.epsilon, classes, generator.derive(b"randomized response"))

    def adapter_labels(self, rows: Sequence[TokenRow], labels: Tensor) -> Tensor:
        return self.randomizer.labels([_name(row) for row in rows], labels)

    def report(self) -> dict[str, float]:
        label = PureAccountant(float(self.epsilon)).guarantee()
        return {**super().report(), "label_epsilon": label.epsilon, "label_auc_bound": label.auc_bound}

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the labels that were drawn.

        They aren't part of `step_state_dict`: a step that is undone may already have been sent to operators.
        """
        return {f"randomized.{name}": tensor for name, tensor in self.randomizer.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        randomized = under("randomized.", state)
        if randomized:
            self.randomizer.load_state_dict(randomized)


def _name(row: TokenRow) -> bytes:
    """Returns a hash of the tokens, which identifies an example."""
    return hashlib.sha256(repr((row.ids, row.types)).encode()).digest()[:NAME_BYTES]
