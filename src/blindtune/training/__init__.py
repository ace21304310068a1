"""The training loop of both products: steps, learning rates, checkpoints, interruption, callbacks and summaries."""

from blindtune.training.callbacks import Callback
from blindtune.training.config import TrainConfig
from blindtune.training.interruption import Interrupted
from blindtune.training.schedule import linear_rate, steps_for
from blindtune.training.summary import LabelsSummary, TextsSummary, read_summary
from blindtune.training.trainer import Trainer

__all__ = [
    "Callback",
    "Interrupted",
    "LabelsSummary",
    "TextsSummary",
    "TrainConfig",
    "Trainer",
    "linear_rate",
    "read_summary",
    "steps_for",
]
