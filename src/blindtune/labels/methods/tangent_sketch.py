"""Tangent sketch: what LoRA could learn to first order, without adapters. Nothing that is sent depends on labels.

texts ──▶ h(x, 0), and J(x) v_1 … J(x) v_K for public v ──▶ kernel of both ──▶ ridge regression, on the client

J(x) is the Jacobian of the hidden states with respect to LoRA's B matrices (`blindtune.models.tangents`). A fine-tuned
model close to the pretrained one is a linear function of it, so kernel regression with ⟨J(x), J(x')⟩ is fine-tuning in
the regime of the neural tangent kernel (Jacot et al. 2018; Malladi et al. 2023), and its sketch comes close to that.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from peft import LoraConfig
from torch import Tensor

from blindtune.client import Backbone
from blindtune.client.backbone import DIRECTIONS_AT_ONCE
from blindtune.errors import ConfigError
from blindtune.labels.classifiers import Candidate, Choice, choose_among, layer_groups
from blindtune.labels.head import Head, SketchHead
from blindtune.labels.methods.base import FrozenMethod, method
from blindtune.labels.placement import Part
from blindtune.models.adapters import lora_spec
from blindtune.models.tangents import check_offered
from blindtune.models.tokenizer import TokenRow
from blindtune.privacy.randomness import SecureGenerator
from blindtune.wire import Directions, ModelInfo, Projection, Readout

Blocks = Literal["upper", "all"]
WEIGHTS = (0.0, 0.3, 1.0, 3.0)
"""Weights of the sketch's kernel that are tried. With 0 the head reads the frozen features alone."""
RIDGES = (0.05, 0.3, 1.0)
GAMMA = 0.5


@method
@dataclass
class TangentSketch(FrozenMethod):
    """Fits a kernel classifier on frozen states and on LoRA's Jacobian along public directions: zero bits about labels.

    Operators compute 2 K passes through the adapted blocks for each text, once.

    Args:
        directions: K, the number of directions.
        rank: rank of the adapters whose Jacobian is sketched.
        blocks: the blocks with adapters: the `upper` half, or `all`.
        size: number of values that are returned of each J(x) v, a public random projection; 0 for all.
        seed: public seed of the directions.
    Raises:
        ConfigError: an option is out of range.
    """

    directions: int = 32
    rank: int = 8
    blocks: Blocks = "upper"
    size: int = 96
    seed: int = 0

    name: ClassVar[str] = "tangent-sketch"
    title: ClassVar[str] = "tangent sketch"
    reads: ClassVar[Mapping[str, Any]] = {"readout": "all", "pairs": "both"}

    def __post_init__(self) -> None:
        if self.blocks not in get_args(Blocks):
            raise ConfigError(f"There are no blocks = {self.blocks!r}.", remedy="Use one of: upper, all.")
        for name, least in (("directions", 1), ("rank", 1), ("size", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{name} = {getattr(self, name)} is less than {least}.", remedy="Use a larger number."
                )

    @property
    def requests_per_text(self) -> int:
        return 1 + math.ceil(self.directions / DIRECTIONS_AT_ONCE)

    def attach(self, backbone: Backbone, classes: int, generator: SecureGenerator) -> None:
        super().attach(backbone, classes, generator)
        info = backbone.info
        key = hashlib.sha256(b"blindtune tangents" + self.seed.to_bytes(8, "little", signed=True)).hexdigest()
        modules = lora_spec(LoraConfig(r=self.rank, layers_to_transform=self.blocks_of(info)), info).modules
        self._directions = Directions(modules=modules, rank=self.rank, seed=key, count=self.directions)
        size = min(self.size or info.hidden_size, info.hidden_size)
        projection = Projection(seed=key, size=size) if size < info.hidden_size else None
        self._readout = Readout(pooling=backbone.readout.pooling, projection=projection)
        self._sketch = self.directions * size
        check_offered(self._directions, self._readout, info)
        self._groups = layer_groups(backbone.readout.layers, info.states, backbone.pairs)

    def blocks_of(self, info: ModelInfo) -> list[int]:
        """Returns the indices of the blocks with adapters."""
        count = info.states - 1 or info.layers  # of an encoder-decoder as many blocks on either side
        return list(range(count // 2 if self.blocks == "upper" else 0, count))

    def inputs(self, backbone: Backbone, rows: Sequence[TokenRow]) -> Tensor:
        """Returns the frozen features and, after them, the sketch, `(N, k · d + K · size)`."""
        frozen = backbone.frozen(rows)
        return torch.cat([frozen, backbone.tangents(rows, self._directions, readout=self._readout).flatten(1)], dim=-1)

    def fetch(self, backbone: Backbone, rows: Sequence[TokenRow]) -> None:
        super().fetch(backbone, rows)
        backbone.tangents(rows, self._directions, readout=self._readout)

    def fit_head(self, backbone: Backbone, rows: Sequence[TokenRow], labels: Tensor, classes: int) -> Choice:
        features = self.inputs(backbone, rows)
        settings = [{"gamma": GAMMA, "ridge": ridge, "weight": weight} for weight in WEIGHTS for ridge in RIDGES]
        candidates = [Candidate(name, "sketch", each) for name in self._groups for each in settings]
        make = partial(self._make, backbone.parts, features.shape[1], classes)
        return choose_among([candidates], make, features, labels, self.on_progress)

    def _make(self, of: int, dim: int, classes: int, candidate: Candidate) -> Head:
        arguments: dict[str, Any] = {**candidate.settings, "parts": self._groups[candidate.layers], "of": of}
        return SketchHead(dim, classes, sketch=self._sketch, **arguments)

    def exposure(self, part: Part, operators: int, *, random_adam_moments: float = 0.0) -> str:
        return f"sees texts, with {self.directions} public directions: nothing about labels"
