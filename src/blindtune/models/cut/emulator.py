"""Emulators: trunks with uniformly dropped blocks, around which clients train the bottom and the top.

    folder/emulator.safetensors    tensors of the kept blocks, under the whole model's names
    folder/manifest.json           source model, hashes and signature (`blindtune.models.cut.manifest`)

With int8, a linear layer's weight `(out, in)` is stored as three tensors, like hidden states of `out` tokens on the
wire (`blindtune.wire.quantize`): `.values` int8, `.scales` fp16, one for each output channel, and `.exponent`. So
|w − ŵ| ≤ max |row| / 254, up to 0.2% more for the rounding of scales.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from blindtune.errors import ConfigError, EmulatorError
from blindtune.files import replace_file
from blindtune.models.backbone import TORCH_DTYPES, FrozenBackbone, tensors_sha256
from blindtune.models.cut.manifest import Distillation, Manifest, read_manifest, sign_manifest
from blindtune.models.cut.parts import Cut, CutModel, Part, build_part, config_from_json, layers_of, thin_trunk
from blindtune.wire import dequantize, quantize

WEIGHTS_FILE, MANIFEST_FILE = "emulator.safetensors", "manifest.json"


def kept_layers(n: int, j: int) -> list[int]:
    """Returns the indices of the j layers to keep of n: round(i (n − 1) / (j − 1)), which includes the first and last.

    For j = 1 it returns the first one alone.

    Raises:
        ConfigError: `j` is outside 1 … n.
    """
    if not 1 <= j <= n:
        raise ConfigError(
            f"An emulator of {j} layers, of a trunk of {n}, isn't possible.", remedy=f"Keep 1 to {n} (--keep)."
        )
    return [0] if j == 1 else [round(i * (n - 1) / (j - 1)) for i in range(j)]


def make_emulator(cut_model: CutModel, keep: int) -> Part:
    """Returns a copy of `keep` of the trunk's blocks, with the trunk's interface: `(B, L, d)`, `(B,)` -> `(B, L, d)`.

    Raises:
        ConfigError: as `kept_layers`.
    """
    trunk = cut_model.parts["trunk"].blocks
    return copy.deepcopy(thin_trunk(cut_model.causal, cut_model.cut, [trunk[i] for i in kept_layers(len(trunk), keep)]))


def stored_tensors(emulator: Part, *, dtype: torch.dtype, int8: bool) -> dict[str, Tensor]:
    """Returns the emulator's weights as they are stored on disk and sent, on the CPU."""
    linear = {f"{name}.weight" for name, module in emulator.causal.named_modules() if isinstance(module, nn.Linear)}
    tensors: dict[str, Tensor] = {}
    for name, weight in emulator.weights().items():
        weight = weight.detach().cpu()
        if int8 and name in linear:
            tensors |= quantize(name, weight, "int8")
        else:
            tensors[name] = weight.to(dtype).clone()
    return tensors


def restore_emulator(
    config: Mapping[str, Any], cut: Cut, blocks: list[int], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Part:
    """Returns the frozen emulator, on the CPU, whose `stored_tensors` these are.

    Raises:
        EmulatorError: the blocks aren't the trunk's, or the tensors don't fit them.
    """
    weights: dict[str, Tensor] = {}
    try:
        plain = config_from_json(json.dumps(config))
        trunk = cut.blocks("trunk", layers_of(plain))
        if not (blocks and blocks == sorted(set(blocks)) and blocks[0] in trunk and blocks[-1] in trunk):
            raise EmulatorError(
                f"The emulator's blocks {blocks} are not those of a trunk {trunk.start} … {trunk.stop - 1}.",
                remedy="Ask the provider to build it again.",
            )
        for name, tensor in tensors.items():
            whole = name.removesuffix(".values")
            if whole != name:
                weights[whole] = dequantize(whole, tensors, "int8", tensor.shape[-1]).to(dtype)
            elif not name.endswith((".scales", ".exponent")):
                weights[name] = tensor.to(dtype)
        return build_part(plain, "trunk", cut, weights, blocks=blocks)
    except EmulatorError:
        raise
    except Exception as error:  # transformers raises many kinds of errors for inconsistent configurations
        raise EmulatorError(
            f"The emulator's tensors don't fit its manifest: {error}.", remedy="Ask the provider to build it again."
        ) from error


def as_stored(emulator: Part, cut_model: CutModel, *, dtype: torch.dtype, int8: bool) -> Part:
    """Returns the emulator that clients will get: converted to `stored_tensors` and back, with their rounding."""
    tensors = stored_tensors(emulator, dtype=dtype, int8=int8)
    restored = restore_emulator(_config(cut_model), cut_model.cut, list(emulator.blocks), tensors, dtype)
    return restored.to(emulator.device)


@dataclass(frozen=True)
class StoredEmulator:
    """An emulator with its manifest, as a provider stores and sends it.

    Attributes:
        text: the manifest's JSON.
        tensors: the weights as in `stored_tensors`.
    """

    manifest: Manifest
    text: str
    tensors: dict[str, Tensor]

    @staticmethod
    def of(text: str, tensors: Mapping[str, Tensor]) -> StoredEmulator:
        """Checks the manifest's signature and the tensors' hash, and returns the emulator.

        Raises:
            EmulatorError: the manifest was changed after it was signed, or the tensors aren't those that it describes.
        """
        manifest = read_manifest(text)
        digest = tensors_sha256(tensors)
        if digest != manifest.tensors_sha256:
            raise _damaged("tensors", digest, manifest.tensors_sha256)
        return StoredEmulator(manifest, text, dict(tensors))

    @property
    def cut(self) -> Cut:
        """The cut for which the emulator was made."""
        return Cut(self.manifest.bottom, self.manifest.top)

    def verify(self, *, fingerprint: str, cut: Cut, trusted_key: str | None = None) -> None:
        """Checks the emulator against a hosted model.

        Raises:
            EmulatorError: it was made from other weights or for another cut, or isn't signed with the trusted key.
        """
        if trusted_key is not None:
            self.manifest.check_key(trusted_key)
        self.manifest.check_source(fingerprint, cut)

    def part(self) -> Part:
        """Returns the emulator as a module. Raises `EmulatorError` as `restore_emulator` does."""
        if self.manifest.dtype not in TORCH_DTYPES:
            raise EmulatorError(
                f"The emulator has the dtype {self.manifest.dtype!r}.", remedy=f"Known: {', '.join(TORCH_DTYPES)}."
            )
        dtype = TORCH_DTYPES[self.manifest.dtype]
        return restore_emulator(self.manifest.config, self.cut, self.manifest.blocks, self.tensors, dtype)


def save_emulator(
    folder: Path,
    emulator: Part,
    backbone: FrozenBackbone,
    key: Ed25519PrivateKey,
    *,
    int8: bool = False,
    distillation: Distillation | None = None,
) -> StoredEmulator:
    """Writes the weights and then the signed manifest. Replaces an emulator that is already in the folder.

    Args:
        backbone: the cut model from which the emulator was made. Weights are stored in its dtype.
        key: the provider's signing key.
        int8: whether linear layers' weights are stored in int8.
    Raises:
        ValueError: the model isn't cut.
    """
    if backbone.cut_model is None:
        raise ValueError("the model is not cut")
    tensors = stored_tensors(emulator, dtype=backbone.dtype, int8=int8)
    content = save(tensors)
    fields = {
        "model": backbone.source.name,
        "fingerprint": backbone.fingerprint,
        "bottom": backbone.cut_model.cut.bottom,
        "top": backbone.cut_model.cut.top,
        "blocks": list(emulator.blocks),
        "config": _config(backbone.cut_model),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "int8": int8,
        "parameters": sum(weight.numel() for weight in emulator.weights().values()),
        "distillation": None if distillation is None else distillation.model_dump(),
        "weights_sha256": hashlib.sha256(content).hexdigest(),
        "tensors_sha256": tensors_sha256(tensors),
    }
    text = sign_manifest(fields, key)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS_FILE, content)
    replace_file(folder / MANIFEST_FILE, text.encode())
    return StoredEmulator(read_manifest(text), text, tensors)


def load_emulator(folder: Path) -> StoredEmulator:
    """Returns the emulator that `save_emulator` wrote, after checking its signature and hashes.

    The source model and the signing key aren't checked here, but by `StoredEmulator.verify`.

    Raises:
        EmulatorError: files are missing, damaged or tampered with.
    """
    try:
        text, content = (folder / MANIFEST_FILE).read_text(), (folder / WEIGHTS_FILE).read_bytes()
    except (OSError, UnicodeDecodeError) as error:
        raise EmulatorError(
            f"{folder} holds no emulator: {error}.", remedy="Make one with `blindtune emulator build --output`."
        ) from None
    manifest, digest = read_manifest(text), hashlib.sha256(content).hexdigest()
    if digest != manifest.weights_sha256:
        raise _damaged(f"weights in {folder / WEIGHTS_FILE}", digest, manifest.weights_sha256)
    try:
        return StoredEmulator.of(text, load(content))
    except SafetensorError as error:
        raise EmulatorError(
            f"{folder / WEIGHTS_FILE} can't be read: {error}.", remedy="Build the emulator again."
        ) from None


def _config(cut_model: CutModel) -> dict[str, Any]:
    """Returns the model's configuration without the path from which the provider loaded it."""
    fields = json.loads(cut_model.config.to_json_string())
    fields.pop("_name_or_path", None)
    return fields


def _damaged(what: str, digest: str, expected: str) -> EmulatorError:
    """Returns the error for content with another SHA-256 than the manifest says."""
    return EmulatorError(
        f"The emulator's {what} have the SHA-256 {digest[:12]}…; its manifest says {expected[:12]}…: they were damaged "
        "or tampered with.",
        remedy="Get the emulator from its provider again.",
    )
