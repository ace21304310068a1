"""Randomised response (Warner 1965): labels that are true with a known probability, drawn once for each example.

Training on them is label differential privacy (Ghazi et al. 2021): whatever is computed from the randomised labels, at
any number of steps, tells an ε-bounded amount about a true one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from blindtune.privacy.randomness import SecureGenerator

NAME_BYTES = 16


def keep_probability(epsilon: float, classes: int) -> float:
    """The probability of the true label: e^ε / (e^ε + K − 1).

    Raises:
        ValueError: ε that isn't positive and finite, or fewer than two classes.
    """
    if not 0 < epsilon < math.inf or classes < 2:
        raise ValueError(f"epsilon = {epsilon} and {classes} classes: need a positive, finite epsilon and two classes.")
    return 1.0 / (1.0 + (classes - 1) * math.exp(-epsilon))


def randomize(label: int, epsilon: float, classes: int, *, generator: SecureGenerator) -> int:
    """The true label with `keep_probability`, or else one of the others, each as likely as the next.

    Raises:
        ValueError: as `keep_probability`, or a label outside 0 … K − 1.
    """
    if not 0 <= label < classes:
        raise ValueError(f"The label {label} is none of {classes} classes.")
    keep, other = generator.uniform(2).tolist()  # on (0, 1]
    if keep <= keep_probability(epsilon, classes):
        return label
    return (label + math.ceil(other * (classes - 1))) % classes


class LabelRandomizer:
    """Randomised labels of examples that may come again: each is drawn when its example is first seen, then kept.

    A second draw for the same example would be a second view of its label, and many would average the noise away. So
    outcomes are kept, and are part of the state; and each is drawn from a stream keyed by the example, so that a step
    that is repeated from an older state draws as before. Examples with equal names count as one, whose label is
    that of the first: were each kept or changed on its own, a comparison of the two could tell both.

    Args:
        epsilon: ε of one example's label.
        classes: K.
        generator: secret; what is drawn depends on its key alone, not on its position.
    Raises:
        ValueError: as `keep_probability`.
    """

    def __init__(self, epsilon: float, classes: int, generator: SecureGenerator) -> None:
        keep_probability(epsilon, classes)  # raises
        self.epsilon, self.classes, self._generator = epsilon, classes, generator
        self._drawn: dict[bytes, int] = {}

    def labels(self, examples: Sequence[bytes], labels: Tensor) -> Tensor:
        """Randomised labels `(B,)`, int64, of examples with these names (16 bytes each) and true labels `(B,)`.

        Raises:
            ValueError: another number of names than labels, or a name of another length.
        """
        if any(len(name) != NAME_BYTES for name in examples):
            raise ValueError(f"Names of examples have {NAME_BYTES} bytes.")
        for name, label in zip(examples, labels.tolist(), strict=True):
            if name not in self._drawn:
                generator = self._generator.derive(b"label", name)
                self._drawn[name] = randomize(label, self.epsilon, self.classes, generator=generator)
        return torch.tensor([self._drawn[name] for name in examples], dtype=torch.int64, device=labels.device)

    def state(self) -> dict[str, Tensor]:
        """All that was drawn: `examples (N, 16)` uint8 and `labels (N,)` int64."""
        names = torch.tensor([list(name) for name in self._drawn], dtype=torch.uint8).reshape(-1, NAME_BYTES)
        return {"examples": names, "labels": torch.tensor(list(self._drawn.values()), dtype=torch.int64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes over what was drawn before; it stands against what was drawn here."""
        names = [bytes(row) for row in state["examples"].numpy()]
        self._drawn |= dict(zip(names, state["labels"].tolist(), strict=True))
