"""An emulator: the trunk with uniformly dropped blocks, for clients that train their ends around it.

    folder/emulator.safetensors    the kept blocks' tensors, under the whole model's names
    folder/manifest.json           what they are of, their hashes, and a signature (`blindtune.models.manifest`)

With int8, a linear layer's weight `(out, in)` is three tensors, as a hidden state with `out` tokens would travel
(`blindtune.wire.quantize`): `.values` int8, `.scales` fp16, one for each output channel, `.exponent`. So
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
from blindtune.models.manifest import Distillation, Manifest, read_manifest, sign_manifest
from blindtune.models.split import Cut, Part, SplitModel, build_part, config_from_json, layers_of, thin_trunk
from blindtune.wire import dequantize, quantize

WEIGHTS_FILE, MANIFEST_FILE = "emulator.safetensors", "manifest.json"


def kept_layers(n: int, j: int) -> list[int]:
    """Which j of n layers stay: round(i (n − 1) / (j − 1)), both ends among them; the first alone for j = 1.

    Raises:
        ConfigError: `j` outside 1 … n.
    """
    if not 1 <= j <= n:
        raise ConfigError(f"An emulator of {j} layers, of a trunk of {n}.", remedy=f"Keep 1 to {n} (--keep).")
    return [0] if j == 1 else [round(i * (n - 1) / (j - 1)) for i in range(j)]


def make_emulator(split: SplitModel, keep: int) -> Part:
    """A copy of `keep` of the trunk's blocks, to be called as the trunk: `(B, L, d)`, lengths `(B,)` -> `(B, L, d)`.

    Raises:
        ConfigError: as `kept_layers`.
    """
    trunk = split.parts["trunk"].blocks
    return copy.deepcopy(thin_trunk(split.causal, split.cut, [trunk[i] for i in kept_layers(len(trunk), keep)]))


def stored_tensors(emulator: Part, *, dtype: torch.dtype, int8: bool) -> dict[str, Tensor]:
    """The emulator's weights as they are on disk and on the wire, on the CPU."""
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
    """The emulator from `stored_tensors`, frozen, on the CPU.

    Raises:
        EmulatorError: blocks that aren't the trunk's, or tensors that don't fit them.
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
    except Exception as error:  # of transformers, many kinds for configurations that make no sense
        raise EmulatorError(
            f"The emulator's tensors don't fit its manifest: {error}.", remedy="Ask the provider to build it again."
        ) from error


def as_stored(emulator: Part, split: SplitModel, *, dtype: torch.dtype, int8: bool) -> Part:
    """The emulator that clients will get: through `stored_tensors` and back, rounding included."""
    tensors = stored_tensors(emulator, dtype=dtype, int8=int8)
    restored = restore_emulator(_config(split), split.cut, list(emulator.blocks), tensors, dtype)
    return restored.to(emulator.device)


@dataclass(frozen=True)
class StoredEmulator:
    """An emulator as a provider made it.

    Attributes:
        text: the manifest's JSON.
        tensors: as in `stored_tensors`.
    """

    manifest: Manifest
    text: str
    tensors: dict[str, Tensor]

    @staticmethod
    def of(text: str, tensors: Mapping[str, Tensor]) -> StoredEmulator:
        """Raises `EmulatorError` for a manifest that was changed since it was signed, or tensors that aren't its."""
        manifest = read_manifest(text)
        found = tensors_sha256(tensors)
        if found != manifest.tensors_sha256:
            raise _damaged("tensors", found, manifest.tensors_sha256)
        return StoredEmulator(manifest, text, dict(tensors))

    @property
    def cut(self) -> Cut:
        return Cut(self.manifest.bottom, self.manifest.top)

    def verify(self, *, fingerprint: str, cut: Cut, trusted_key: str | None = None) -> None:
        """Raises `EmulatorError` if it is of other weights, for another cut, or not signed with the trusted key."""
        if trusted_key is not None:
            self.manifest.check_key(trusted_key)
        self.manifest.check_source(fingerprint, cut)

    def part(self) -> Part:
        """The emulator, ready to be called; raises `EmulatorError` as `restore_emulator`."""
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
    """Writes weights and then the signed manifest; an emulator that was there is replaced.

    Args:
        backbone: the split model that the emulator is of. Weights are stored in its dtype.
    """
    if backbone.split is None:
        raise ValueError("the model is not split")
    tensors = stored_tensors(emulator, dtype=backbone.dtype, int8=int8)
    content = save(tensors)
    fields = {
        "model": backbone.source.name,
        "fingerprint": backbone.fingerprint,
        "bottom": backbone.split.cut.bottom,
        "top": backbone.split.cut.top,
        "blocks": list(emulator.blocks),
        "config": _config(backbone.split),
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
    """What `save_emulator` wrote, checked against its own signature and hashes. Of which model it is, and whose key
    it has, `StoredEmulator.verify` tells.

    Raises:
        EmulatorError: files that are missing, damaged or tampered with.
    """
    try:
        text, content = (folder / MANIFEST_FILE).read_text(), (folder / WEIGHTS_FILE).read_bytes()
    except (OSError, UnicodeDecodeError) as error:
        raise EmulatorError(
            f"{folder} holds no emulator: {error}.", remedy="Make one with `blindtune emulator build --output`."
        ) from None
    manifest, found = read_manifest(text), hashlib.sha256(content).hexdigest()
    if found != manifest.weights_sha256:
        raise _damaged(f"weights in {folder / WEIGHTS_FILE}", found, manifest.weights_sha256)
    try:
        return StoredEmulator.of(text, load(content))
    except SafetensorError as error:
        raise EmulatorError(
            f"{folder / WEIGHTS_FILE} can't be read: {error}.", remedy="Build the emulator again."
        ) from None


def _config(split: SplitModel) -> dict[str, Any]:
    """The configuration, without the path that the provider loaded it from."""
    fields = json.loads(split.config.to_json_string())
    fields.pop("_name_or_path", None)
    return fields


def _damaged(what: str, found: str, expected: str) -> EmulatorError:
    return EmulatorError(
        f"The emulator's {what} have the SHA-256 {found[:12]}…; its manifest says {expected[:12]}…: they were damaged "
        "or tampered with.",
        remedy="Get the emulator from its provider again.",
    )
