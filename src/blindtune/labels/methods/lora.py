"""Plain LoRA over the API: one adapter. It is the reference for accuracy.

Gradients are sent in the clear, or with m ≥ 2 in shares to m operators (P3EFT, Algorithm 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from blindtune.labels.methods.base import AdapterMethod, method


@method
@dataclass
class LoRA(AdapterMethod):
    """Trains one adapter in the clear: operators can learn labels from activations, and without shares from gradients.

    Args:
        backprop: options for sending gradients, see `AdapterMethod`.
    """

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
