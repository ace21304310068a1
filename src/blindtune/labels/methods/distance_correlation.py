"""Distance correlation (Sun et al. 2022): plain LoRA with a penalty on the dependence of activations on labels.

    L = task(head(h), y) + Σ_channels weight · log max(dCor²(channel, y), floor)

on channels h and h − h(x, 0), with the bias-corrected dCor² (see `blindtune.privacy.distance_correlation`), or with the
plain one, which P3EFT's authors use. It protects the activations that operators compute, and nothing that they are
sent: gradients are sent in the clear by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from blindtune.checks import check_weights
from blindtune.client import Backbone
from blindtune.errors import ConfigError
from blindtune.labels.methods.base import AdapterMethod, method
from blindtune.privacy.distance_correlation import SMALLEST_BATCH, Estimator, log_distance_correlation
from blindtune.privacy.randomness import SecureGenerator

SMALLEST_SHIFT = 0.01
"""Root mean square of shifts below which they aren't penalised, in units of the frozen features' standard deviation."""


@method
@dataclass
class DistanceCorrelation(AdapterMethod):
    """Trains one LoRA adapter with a penalty on the distance correlation of activations and labels.

    Batches of fewer than four examples have no penalty. Shifts below 1% of the frozen features' standard deviation have
    none either: dCor doesn't depend on scale, so the smaller they are, the larger its gradient would be.

    Args:
        backprop: options for sending gradients, see `AdapterMethod`.
        activation_weight, shift_weight: α, the weights of log dCor² in the loss; 0 for no penalty on that channel.
        estimator: unbiased, or biased for the plain estimator of dCor², which P3EFT's authors use. It has no floor.
    Raises:
        ConfigError: a weight is negative or not a number, or there is no such estimator.
    """

    activation_weight: float = 0.1
    shift_weight: float = 0.0
    estimator: Estimator = "unbiased"

    name: ClassVar[str] = "distance-correlation"
    title: ClassVar[str] = "distance correlation"

    def __post_init__(self) -> None:
        check_weights(activation_weight=self.activation_weight, shift_weight=self.shift_weight)
        if self.estimator not in get_args(Estimator):
            raise ConfigError(
                f"There is no estimator {self.estimator!r}.", remedy=f"Use one of: {', '.join(get_args(Estimator))}."
            )

    @property
    def needs_frozen(self) -> bool:
        return self.shift_weight > 0

    @property
    def defence(self) -> str | None:
        return "the penalty" if self.activation_weight > 0 or self.shift_weight > 0 else None

    def attach(self, backbone: Backbone, classes: int, generator: SecureGenerator) -> None:
        super().attach(backbone, classes, generator)
        self._classes = classes

    def penalties(self, hidden: Tensor, frozen: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
        penalties: dict[str, Tensor] = {}
        if len(labels) < SMALLEST_BATCH:
            return penalties
        classes = F.one_hot(labels, self._classes).to(hidden.dtype)  # (B, K)
        if self.activation_weight > 0:
            penalties["distance_correlation"] = self.activation_weight * self._log_dcor(hidden[0], classes)
        if frozen is not None:
            shift = hidden[0] - frozen
            spread = (frozen - frozen.mean(0)).pow(2).mean().sqrt()
            with torch.no_grad():
                large = bool(shift.pow(2).mean().sqrt() > SMALLEST_SHIFT * spread)
            if large:
                penalties["distance_correlation_shift"] = self.shift_weight * self._log_dcor(shift, classes)
        return penalties

    def _log_dcor(self, channel: Tensor, classes: Tensor) -> Tensor:
        return log_distance_correlation(channel, classes, estimator=self.estimator)
