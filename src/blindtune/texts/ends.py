"""The ends of a cut model that the client trains, and their checkpoints, which PEFT and transformers can load.

`lora`: trains PEFT adapters on the blocks of bottom and top, saved as one PEFT checkpoint for the whole model. The
blocks of an emulator may have adapters too; they are meant for the trunk's blocks that the emulator's blocks stand for.
`full`: trains the blocks' own weights, saved as a `model.safetensors` under the whole model's names.

Embeddings and LM head are never trained. A checkpoint holds everything that differs from the pretrained model, and so
also the checkpoint that training started from: LoRA that started from LoRA is saved as their sum, and any other
combination as whole weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from blindtune.errors import CheckpointError, ConfigError, InvalidTensor
from blindtune.files import read_tensors, write_tensors
from blindtune.models.adapters import PEFT_PREFIX
from blindtune.models.backbone import tensors_sha256
from blindtune.models.cut.merge import add_lora, lora_modules, merge
from blindtune.models.cut.parts import Part, PartName, blocks_name, decoder_of

Tune = Literal["lora", "full"]
ADAPTER, WHOLE, CONFIG = "adapter_model.safetensors", "model.safetensors", "adapter_config.json"
BEYOND_MATRICES = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layer_replication", "fan_in_fan_out")
"""Options in PEFT's configuration that change how LoRA matrices are applied."""
_NAME = "default"
"""Name of the adapter in PEFT's modules."""


@dataclass
class Ends:
    """The bottom and the top of a cut model, with the parameters that are trained.

    Args:
        bottom, top: the two ends. They are changed in place.
        parts: the parts that are trained (`trunk`: the emulator's blocks). The others are frozen.
        tune: `lora` or `full`.
        rank, alpha, targets: LoRA's rank, alpha and target modules. Default targets: all linear layers of the blocks.
        seed: seed of LoRA's initial weights.
        emulator: emulator used instead of the trunk, if it is tuned too or a checkpoint may hold adapters of its
            blocks.
    Raises:
        ConfigError: no block has these targets, or whole weights of an emulator are to be tuned, which aren't weights
            of the trunk.
    """

    bottom: Part
    top: Part
    parts: Sequence[PartName] = ("bottom", "top")
    tune: Tune = "lora"
    rank: int = 16
    alpha: int = 32
    targets: Sequence[str] | None = None
    seed: int = 0
    emulator: Part | None = None

    def __post_init__(self) -> None:
        if "trunk" in self.parts and (self.emulator is None or self.tune == "full"):
            raise ConfigError(
                "Of the trunk, only adapters on an emulator's blocks can be tuned here.",
                remedy="Use --tune lora, with a method that has an emulator.",
            )
        self.trainable: dict[str, nn.Parameter] = {}
        """Trained parameters by their names in the whole model, or for LoRA by PEFT's names."""
        self.start = ""
        """Hash of the tuned parts that training started from; empty for the pretrained model."""
        self._merged_lora: list[tuple[Mapping[str, Tensor], float]] | None = []
        """LoRA tensors that were merged into the frozen weights, with their scalings; None after whole weights."""
        self._started: set[str] = set()
        """Names of the weights that `start_from` has changed."""
        held = self._parts()
        for part in held.values():
            part.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            for name in self.parts:
                (self._add_lora if self.tune == "lora" else self._unfreeze)(held[name])

    def _parts(self) -> dict[PartName, Part]:
        """Returns the parts that the client holds, in the model's order."""
        trunk: dict[PartName, Part] = {} if self.emulator is None else {"trunk": self.emulator}
        return {"bottom": self.bottom, **trunk, "top": self.top}

    def parameters(self, part: Literal["bottom", "top"] | None = None) -> list[nn.Parameter]:
        """Returns the trained parameters, of one end or of all parts."""
        if part is None:
            return list(self.trainable.values())
        owned = {id(parameter) for parameter in getattr(self, part).parameters()}
        return [parameter for parameter in self.trainable.values() if id(parameter) in owned]

    def _add_lora(self, part: Part) -> None:
        blocks = decoder_of(part.causal).layers
        prefix = blocks_name(part.causal)
        linear = [
            f"{index}.{name}"
            for index in part.blocks
            for name, module in blocks[index].named_modules()
            if isinstance(module, nn.Linear)
        ]
        chosen = [n for n in linear if self.targets is None or n.rsplit(".", 1)[-1] in self.targets]
        if not chosen:
            some = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise ConfigError(f"No layer is called {list(self.targets or ())}.", remedy=f"Choose among: {some}.")
        # PEFT gets the blocks alone: it would search a whole model for embeddings, and a part may have none
        inject_adapter_in_model(LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=chosen), blocks, _NAME)
        for name, parameter in blocks.named_parameters():
            if f".{_NAME}." in name:
                parameter.requires_grad_()
                self.trainable[f"{PEFT_PREFIX}{prefix}." + name.replace(f".{_NAME}.", ".")] = parameter

    def _unfreeze(self, part: Part) -> None:
        blocks = decoder_of(part.causal).layers
        owned = {id(parameter) for index in part.blocks for parameter in blocks[index].parameters()}
        for name, parameter in part.causal.named_parameters():
            if id(parameter) in owned:
                parameter.requires_grad_()
                self.trainable[name] = parameter

    def tensors(self) -> dict[str, Tensor]:
        """Returns the trained tensors by name, on the CPU."""
        return {name: parameter.detach().cpu() for name, parameter in self.trainable.items()}

    def save(self, folder: Path, base_model: str) -> None:
        """Writes a PEFT checkpoint, or the weights of all tuned blocks. Only the user can read the tensors (mode 600).

        Args:
            base_model: value of `base_model_name_or_path` in PEFT's configuration.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.tune == "full" or self._merged_lora is None:
            write_tensors(folder / WHOLE, self._whole(), {"format": "pt"})
            return
        tensors, rank, alpha = self.tensors(), self.rank, self.alpha
        if self._merged_lora:
            tensors, rank = add_lora([*self._merged_lora, (tensors, alpha / rank)])
            alpha = rank
        write_tensors(folder / ADAPTER, tensors, {"format": "pt"})
        config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=lora_modules(tensors), task_type="CAUSAL_LM",
            base_model_name_or_path=base_model, inference_mode=True,
        )  # fmt: skip
        config.save_pretrained(str(folder))

    def _whole(self) -> dict[str, Tensor]:
        """Returns the weights of all blocks that training or its start changed, with LoRA merged."""
        blocks = self._blocks([self.bottom, self.top])  # without the emulator's, which aren't weights of the model
        weights = {name: parameter.detach() for block in blocks for name, parameter in block.items()}
        merged: dict[str, Tensor] = {}
        if self.tune == "lora" and self.trainable:
            merged = merge(self.tensors(), self.alpha / self.rank, weights)
        changed = self._started | set(merged if self.tune == "lora" else self.trainable)
        return {n: merged.get(n, weights[n]) for block in blocks if not changed.isdisjoint(block) for n in block}

    def _blocks(self, parts: Iterable[Part]) -> list[dict[str, nn.Parameter]]:
        """Returns each block's weights under the whole model's names, without LoRA matrices."""
        result: list[dict[str, nn.Parameter]] = []
        for part in parts:
            blocks, prefix = decoder_of(part.causal).layers, blocks_name(part.causal)
            for index in part.blocks:
                named = {name: p for name, p in blocks[index].named_parameters() if f".{_NAME}." not in name}
                result.append({f"{prefix}.{index}.{n.replace('.base_layer.', '.')}": p for n, p in named.items()})
        return result

    def _changes_emulator(self, names: set[str]) -> bool:
        """Returns whether any of these weights belongs to an emulator's block.

        Such weights can't be saved as whole weights, since they aren't the model's; only changes of them can.
        """
        return self.emulator is not None and any(not names.isdisjoint(block) for block in self._blocks([self.emulator]))

    def start_from(self, tensors: Mapping[str, Tensor], scaling: float | None) -> None:
        """Merges tuned parts, as `read_tuned_parts` returns them, into the frozen weights that training starts from.

        Args:
            tensors: tuned tensors by name.
            scaling: LoRA's alpha / rank; None for whole weights.
        Raises:
            InvalidTensor: see `merge`; or whole weights would be saved together with adapters on an emulator, which
                isn't possible. Nothing is changed then.
        """
        blocks = self._blocks(self._parts().values())
        weights = {name: parameter for block in blocks for name, parameter in block.items()}
        updates = merge(tensors, scaling, weights)
        whole = scaling is None or self._merged_lora is None or self.tune == "full"
        if whole and ("trunk" in self.parts or self._changes_emulator(self._started | set(updates))):
            raise InvalidTensor(
                "Whole weights and adapters on an emulator's blocks can't be saved in one checkpoint.",
                remedy="Start from a LoRA checkpoint, and tune it with --tune lora.",
            )
        with torch.no_grad():
            for name, tensor in updates.items():
                weights[name].copy_(tensor)
        if scaling is None:
            self._merged_lora = None
        elif self._merged_lora is not None:
            self._merged_lora.append((tensors, scaling))
        self._started |= set(updates)
        self.start = hashlib.sha256(f"{self.start} {tensors_sha256(tensors)} {scaling}".encode()).hexdigest()

    def copy(self, tensors: dict[str, Tensor], source: str) -> None:
        """Copies tensors into the trained parameters by name. Raises `CheckpointError`, and then changes nothing."""
        wrong = sorted(set(tensors) ^ set(self.trainable))
        wrong += [n for n, p in self.trainable.items() if n in tensors and tensors[n].shape != p.shape]
        if wrong:
            raise CheckpointError(
                f"{source} was made for other layers or another rank, e.g. {wrong[0]}.",
                remedy="Use the options that it was trained with.",
            )
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise CheckpointError(f"{source} holds NaN or infinity.", remedy="Use an earlier checkpoint.")
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.trainable[name].copy_(tensor)


def merge_checkpoint(ends: Ends, folder: Path) -> None:
    """Merges a checkpoint of either kind into the ends' frozen weights (`Ends.start_from`).

    Raises:
        CheckpointError: the checkpoint is of other blocks, or damaged. Nothing is changed then.
    """
    try:
        ends.start_from(*read_tuned_parts(folder))
    except InvalidTensor as error:
        raise CheckpointError(f"{folder} doesn't fit: {error.message}", remedy=error.remedy) from None


def read_tuned_parts(folder: Path) -> tuple[dict[str, Tensor], float | None]:
    """Reads the tensors of a checkpoint of either kind, and LoRA's alpha / rank (None for whole weights).

    Raises:
        CheckpointError: the folder holds no checkpoint of either kind, or a damaged one.
    """
    kind = read_ends(folder)
    whole = kind["tune"] == "full"
    tensors, _ = read_tensors(folder / (WHOLE if whole else ADAPTER))
    return tensors, None if whole else kind["alpha"] / kind["rank"]


def read_ends(folder: Path) -> dict[str, Any]:
    """Reads the options of `Ends` from a checkpoint that `Ends.save` wrote: `tune`, `rank`, `alpha`, `targets`.

    A checkpoint doesn't name the trained parts.

    Raises:
        CheckpointError: the folder holds no checkpoint of either kind, or LoRA with options besides one rank and one
            alpha.
    """
    if (folder / WHOLE).is_file():
        return {"tune": "full"}
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder} holds no {CONFIG} and no {WHOLE}.", remedy="Give the folder of a checkpoint of tuned parts."
        )
    try:
        config = cast("dict[str, Any]", json.loads((folder / CONFIG).read_text()))
        unsupported = [name for name in BEYOND_MATRICES if config.get(name)]
        if unsupported:
            option = unsupported[0]
            raise CheckpointError(
                f"{folder / CONFIG} has {option} = {config[option]!r}, so its matrices alone don't define its changes.",
                remedy="Use a plain LoRA checkpoint, with one rank and one alpha.",
            )
        targets = sorted({str(name).rsplit(".", 1)[-1] for name in config["target_modules"]})
        return {"tune": "lora", "rank": int(config["r"]), "alpha": int(config["lora_alpha"]), "targets": targets}
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{folder / CONFIG} isn't a LoRA configuration.", remedy="Use an undamaged copy of the checkpoint."
        ) from None
