"""Configuration of a training run: its length, batch size, optimizer and learning rates."""

from __future__ import annotations

from dataclasses import dataclass

from blindtune.errors import ConfigError
from blindtune.training.schedule import linear_rate


@dataclass(frozen=True)
class TrainConfig:
    """Settings of AdamW with learning rates that warm up linearly and decay linearly to `floor`.

    Args:
        steps: number of steps of the run.
        batch_size: number of examples in a step.
        learning_rate: highest learning rate of the adapters or of the tuned parts.
        weight_decay: weight decay of AdamW.
        betas: decay rates of AdamW's moments.
        warmup: number of steps over which the learning rates rise.
        floor: lower limit of the decay, as a fraction of the highest learning rate.
        max_grad_norm: norm to which a step's gradient over all trained parameters is clipped; 0 for no clipping.
        seed: seed of the batches and of all public random numbers.
    Raises:
        ConfigError: there are no steps or no examples in a step, the learning rate isn't positive, or the norm is
            negative.
    """

    steps: int = 150
    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 10
    floor: float = 0.03
    max_grad_norm: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1 or not self.learning_rate > 0:
            raise ConfigError(
                f"steps = {self.steps}, batch_size = {self.batch_size}, learning_rate = {self.learning_rate}.",
                remedy="Use at least one step, one example and a positive learning rate.",
            )

        if not self.max_grad_norm >= 0:
            raise ConfigError(
                f"max_grad_norm = {self.max_grad_norm} is no norm.", remedy="Use a positive number; 0 for no clipping."
            )

    def rate(self, step: int) -> float:
        """Returns the factor on the learning rates at step 0, 1, …"""
        return linear_rate(step, self.steps, self.warmup, self.floor)
