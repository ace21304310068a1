"""The methods for private labels, one file each. Importing this package registers all of them in `METHODS`."""

from blindtune.labels.methods.base import METHODS, AdapterMethod, Method, make_method, method, method_class, options_of
from blindtune.labels.methods.distance_correlation import DistanceCorrelation
from blindtune.labels.methods.features import Features
from blindtune.labels.methods.lora import LoRA
from blindtune.labels.methods.p3eft import P3EFT
from blindtune.labels.methods.padded_lora import PaddedLoRA
from blindtune.labels.methods.pslf import PSLF
from blindtune.labels.methods.randomized_response import RandomizedResponse
from blindtune.labels.methods.side import Side
from blindtune.labels.methods.tangent_sketch import TangentSketch

__all__ = [
    "METHODS",
    "P3EFT",
    "PSLF",
    "AdapterMethod",
    "DistanceCorrelation",
    "Features",
    "LoRA",
    "Method",
    "PaddedLoRA",
    "RandomizedResponse",
    "Side",
    "TangentSketch",
    "make_method",
    "method",
    "method_class",
    "options_of",
]
