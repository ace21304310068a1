"""Frozen pretrained models, LoRA adapters, tokenizers and cut models. Client, server and audit build the same ones."""

from blindtune.models.adapters import LoraAdapter, lora_spec
from blindtune.models.backbone import FrozenBackbone, Tokens, load_backbone
from blindtune.models.cut.parts import Cut, CutModel, Part
from blindtune.models.lora import LoraLayout, ModuleShapes
from blindtune.models.sources import find_source
from blindtune.models.tokenizer import Tokenizer

__all__ = [
    "Cut",
    "CutModel",
    "FrozenBackbone",
    "LoraAdapter",
    "LoraLayout",
    "ModuleShapes",
    "Part",
    "Tokenizer",
    "Tokens",
    "find_source",
    "load_backbone",
    "lora_spec",
]
