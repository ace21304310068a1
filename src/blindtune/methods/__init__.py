"""Training algorithms, composed from the defences in `privacy` and the remote model in `client`."""

from blindtune.methods.checkpoint import (
    METHODS,
    adapter_config,
    load_model,
    make_method,
    method_class,
    read_resume,
    read_summary,
    save_model,
)
from blindtune.methods.distance_correlation import DistanceCorrelation
from blindtune.methods.gradients import SharedGradients
from blindtune.methods.head import LinearHead
from blindtune.methods.head_only import HeadOnly
from blindtune.methods.lora import LoRA
from blindtune.methods.model import Method, Output, PrivateModel
from blindtune.methods.p3eft import P3EFT
from blindtune.methods.p3eft_published import PublishedP3EFT
from blindtune.methods.pads import PaddedAdapters
from blindtune.methods.placement import exposure
from blindtune.methods.pslf import PSLF
from blindtune.methods.randomized_response import RandomizedResponse

__all__ = [
    "METHODS",
    "P3EFT",
    "PSLF",
    "DistanceCorrelation",
    "HeadOnly",
    "LinearHead",
    "LoRA",
    "Method",
    "Output",
    "PaddedAdapters",
    "PrivateModel",
    "PublishedP3EFT",
    "RandomizedResponse",
    "SharedGradients",
    "adapter_config",
    "exposure",
    "load_model",
    "make_method",
    "method_class",
    "read_resume",
    "read_summary",
    "save_model",
]
