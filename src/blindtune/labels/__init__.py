"""Training with private labels: the model, its methods, the trainer, and checkpoints."""

from blindtune.labels.adam_moments import randomise_adam_moments
from blindtune.labels.channels.padded import PaddedAdapters
from blindtune.labels.channels.private_backprop import PrivateBackprop, PrivateBackpropOptions
from blindtune.labels.checkpoint import adapter_config, readout_of
from blindtune.labels.classifiers import Candidate, Choice
from blindtune.labels.exposure import exposure
from blindtune.labels.head import (
    HEADS,
    Head,
    KernelHead,
    LinearHead,
    MLPHead,
    PoolerHead,
    SketchHead,
    TwoLayerHead,
    make_head,
)
from blindtune.labels.losses import LOSSES, squared_error
from blindtune.labels.methods import (
    METHODS,
    P3EFT,
    PSLF,
    DistanceCorrelation,
    Features,
    LoRA,
    Method,
    PaddedLoRA,
    RandomizedResponse,
    Side,
    TangentSketch,
    make_method,
    method,
    method_class,
)
from blindtune.labels.metrics import scores
from blindtune.labels.model import Output, PrivateModel
from blindtune.labels.side import SideHead
from blindtune.labels.trainer import Step, TrainConfig, Trainer, evaluate, predict

__all__ = [
    "HEADS",
    "LOSSES",
    "METHODS",
    "P3EFT",
    "PSLF",
    "Candidate",
    "Choice",
    "DistanceCorrelation",
    "Features",
    "Head",
    "KernelHead",
    "LinearHead",
    "LoRA",
    "MLPHead",
    "Method",
    "Output",
    "PaddedAdapters",
    "PaddedLoRA",
    "PoolerHead",
    "PrivateBackprop",
    "PrivateBackpropOptions",
    "PrivateModel",
    "RandomizedResponse",
    "Side",
    "SideHead",
    "SketchHead",
    "Step",
    "TangentSketch",
    "TrainConfig",
    "Trainer",
    "TwoLayerHead",
    "adapter_config",
    "evaluate",
    "exposure",
    "make_head",
    "make_method",
    "method",
    "method_class",
    "predict",
    "randomise_adam_moments",
    "readout_of",
    "scores",
    "squared_error",
]
