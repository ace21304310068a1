"""Randomised response (Warner 1965): each label is kept with a known probability, or else replaced, once per example.

Training on randomised labels satisfies label differential privacy (Ghazi et al. 2021): everything that is computed from
the randomised labels, over any number of steps, is ε-differentially private in each true label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from blindtune.privacy.randomness import SecureGenerator

NAME_BYTES = 16


def keep_probability(epsilon: float, classes: int) -> float:
    """Returns the probability with which the true label is kept: e^ε / (e^ε + K − 1).

    Raises:
        ValueError: ε isn't positive and finite, or there are fewer than two classes.
    """
    if not 0 < epsilon < math.inf or classes < 2:
        raise ValueError(f"epsilon = {epsilon} and {classes} classes: need a positive, finite epsilon and two classes.")
    return 1.0 / (1.0 + (classes - 1) * math.exp(-epsilon))


def randomize(label: int, epsilon: float, classes: int, *, generator: SecureGenerator) -> int:
    """Returns the true label with `keep_probability`, or else one of the other labels with equal probabilities.

    Raises:
        ValueError: as `keep_probability`, or the label is outside 0 … K − 1.
    """
    if not 0 <= label < classes:
        raise ValueError(f"The label {label} is none of {classes} classes.")
    keep, other = generator.uniform(2).tolist()  # on (0, 1]
    if keep <= keep_probability(epsilon, classes):
        return label
    return (label + math.ceil(other * (classes - 1))) % classes


class LabelRandomizer:
    """Randomises each example's label once, in the first call with this example, and returns the same label later.

    A second draw for the same example would be a second observation of its label, and many draws would average the
    randomness away.
    So the outcomes are stored, and are part of the state. Each is drawn from a stream keyed by the example, so that a
    step that is repeated from an older state draws the same label. Examples with equal names count as one, with the
    label of the first: if each were randomised independently, a comparison of the two could reveal both labels.

    Args:
        epsilon: ε of one example's label.
        classes: K, the number of classes.
        generator: secret generator; the outcomes depend on its key alone, not on its position in the stream.
    Raises:
        ValueError: as `keep_probability`.
    """

    def __init__(self, epsilon: float, classes: int, generator: SecureGenerator) -> None:
        keep_probability(epsilon, classes)  # raises
        self.epsilon, self.classes, self._generator = epsilon, classes, generator
        self._drawn: dict[bytes, int] = {}

    def labels(self, examples: Sequence[bytes], labels: Tensor) -> Tensor:
        """Returns randomised labels `(B,)`, int64.

        Args:
            examples: the examples' names, 16 bytes each.
            labels: their true labels, `(B,)`.
        Raises:
            ValueError: there are another number of names than labels, or a name has another length.
        """
        if any(len(name) != NAME_BYTES for name in examples):
            raise ValueError(f"Names of examples have {NAME_BYTES} bytes.")
        for name, label in zip(examples, labels.tolist(), strict=True):
            if name not in self._drawn:
                generator = self._generator.derive(b"label", name)
                self._drawn[name] = randomize(label, self.epsilon, self.classes, generator=generator)
        return torch.tensor([self._drawn[name] for name in examples], dtype=torch.int64, device=labels.device)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns all outcomes so far: `examples (N, 16)` uint8 and `labels (N,)` int64."""
        names = torch.tensor([list(name) for name in self._drawn], dtype=torch.uint8).reshape(-1, NAME_BYTES)
        return {"examples": names, "labels": torch.tensor(list(self._drawn.values()), dtype=torch.int64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Adds the outcomes of an earlier state. They replace outcomes that were drawn here for the same examples."""
        names = [bytes(row) for row in state["examples"].numpy()]
        self._drawn |= dict(zip(names, state["labels"].tolist(), strict=True))
