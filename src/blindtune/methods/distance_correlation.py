"""Distance correlation (Sun et al. 2022): plain LoRA whose activations are kept from being spaced like the labels.

    L = task(head(h), y) + Σ_channels weight · log max(dCor²(channel, y), floor)

on channels h and h − h(x, 0), with the bias-corrected dCor² (see `blindtune.privacy.distance_correlation`). It protects
what operators compute, and nothing that they are sent: gradients travel in the clear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from blindtune.client import Backbone
from blindtune.methods.lora import LoRA
from blindtune.methods.options import check_weights
from blindtune.privacy.distance_correlation import SMALLEST_BATCH, log_distance_correlation
from blindtune.privacy.randomness import SecureGenerator

SMALLEST_SHIFT = 0.01
"""Root mean square of shifts, in units of the frozen features' spread, under which they are left alone."""


@dataclass
class DistanceCorrelation(LoRA):
    """One LoRA adapter, and a penalty on what activations say about labels.

    Batches of fewer than four examples have no penalty. Nor have shifts under 1% of the spread of the frozen features:
    dCor doesn't depend on scale, so its gradient would be as large as they are small.

    Args:
        m, clip_norm, noise_ratio, max_mu, allow_single_operator: gradient shares, see `LoRA`; in the clear by default.
        adapter_noise: noise on the adapters that travel, see `LoRA`.
        activation_weight, shift_weight: α, the weights of log dCor² in the loss; 0 leaves a channel alone.
    Raises:
        ConfigError: a weight that is negative or no number.
    """

    activation_weight: float = 0.1
    shift_weight: float = 0.0

    name: ClassVar[str] = "dc"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(activation_weight=self.activation_weight, shift_weight=self.shift_weight)

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
            penalties["dc"] = self.activation_weight * log_distance_correlation(hidden[0], classes)
        if frozen is not None:
            shift = hidden[0] - frozen
            spread = (frozen - frozen.mean(0)).pow(2).mean().sqrt()
            with torch.no_grad():
                moved = bool(shift.pow(2).mean().sqrt() > SMALLEST_SHIFT * spread)
            if moved:
                penalties["dc_shift"] = self.shift_weight * log_distance_correlation(shift, classes)
        return penalties
