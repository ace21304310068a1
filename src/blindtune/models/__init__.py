"""Pretrained models that both the server and the audit can build, with adapters on them."""

from blindtune.models.adapters import LoraAdapter, lora_spec
from blindtune.models.backbone import FrozenBackbone, Tokens, load_backbone
from blindtune.models.lora import LoraLayout, ModuleShapes
from blindtune.models.sources import find_source
from blindtune.models.split import Cut, Part, SplitModel
from blindtune.models.tokenizer import Tokenizer

__all__ = [
    "Cut",
    "FrozenBackbone",
    "LoraAdapter",
    "LoraLayout",
    "ModuleShapes",
    "Part",
    "SplitModel",
    "Tokenizer",
    "Tokens",
    "find_source",
    "load_backbone",
    "lora_spec",
]
