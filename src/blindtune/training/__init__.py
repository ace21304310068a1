"""The loop around a private model: data, batches, steps, metrics, resume."""

from blindtune.training.batches import BatchPlan
from blindtune.training.data import Columns, Examples, load_examples, split_examples
from blindtune.training.loop import Step, TrainConfig, Trainer, evaluate, predict, steps_for
from blindtune.training.metrics import scores
from blindtune.training.moments import randomise_moments

__all__ = [
    "BatchPlan",
    "Columns",
    "Examples",
    "Step",
    "TrainConfig",
    "Trainer",
    "evaluate",
    "load_examples",
    "predict",
    "randomise_moments",
    "scores",
    "split_examples",
    "steps_for",
]
