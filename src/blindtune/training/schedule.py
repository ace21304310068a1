"""Computes learning rates from the number of a step, so that runs can be resumed, and the number of steps of a run."""

from __future__ import annotations

import math


def linear_rate(step: int, steps: int, warmup: int, floor: float) -> float:
    """Returns the factor on learning rates at step 0, 1, …: the product of a linear warmup and a linear decay.

    Args:
        steps: number of steps over which the decay goes from 1 to 0.
        warmup: number of steps over which the warmup rises to 1.
        floor: lower limit of the decay.
    """
    return min(1.0, (step + 1) / max(1, warmup)) * max(floor, 1 - step / steps)


def steps_for(examples: int, batch_size: int, epochs: float) -> int:
    """Returns the number of steps in `epochs` epochs, at least 1."""
    return max(1, math.ceil(epochs * math.ceil(examples / batch_size)))
