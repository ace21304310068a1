"""The ends of a split model that the client trains, and their checkpoints, which stock tools load.

`lora`: PEFT adapters on the blocks of bottom and top, saved as one PEFT checkpoint for the whole model. Around an
emulator its blocks may have adapters too, which are for the trunk's blocks that those stand for.
`full`: the blocks themselves, saved as a `model.safetensors` under the whole model's names.

Embeddings and LM head stay as they are. A checkpoint holds everything that differs from the pretrained model, so also
what training started from: LoRA over LoRA is their sum, and any other pair whole weights.
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
from blindtune.methods.state import SUMMARY, read_tensors, write_tensors
from blindtune.models.adapters import PEFT_PREFIX
from blindtune.models.backbone import tensors_sha256
from blindtune.models.plugged import add_lora, lora_modules, merge
from blindtune.models.split import Part, PartName, blocks_name, decoder_of

Trained = Literal["lora", "full"]
ADAPTER, WHOLE, CONFIG = "adapter_model.safetensors", "model.safetensors", "adapter_config.json"
BEYOND_MATRICES = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layer_replication", "fan_in_fan_out")
"""What of PEFT's configuration changes how LoRA matrices are applied."""
_NAME = "default"


@dataclass
class Ends:
    """Bottom and top with what of them is trained.

    Args:
        emulator: in the trunk's place, if it is tuned too or a checkpoint may hold adapters of its blocks.
        parts: which are trained (`trunk`: the emulator's blocks); the others stay frozen.
        trained: `lora` or `full`.
        rank, alpha, targets: of LoRA; all linear layers of the blocks if there are no targets.
        seed: of LoRA's initial weights.
    Raises:
        ConfigError: targets that no block has; whole weights of an emulator, which aren't those of the trunk.
    """

    bottom: Part
    top: Part
    parts: Sequence[PartName] = ("bottom", "top")
    trained: Trained = "lora"
    rank: int = 16
    alpha: int = 32
    targets: Sequence[str] | None = None
    seed: int = 0
    emulator: Part | None = None

    def __post_init__(self) -> None:
        if "trunk" in self.parts and (self.emulator is None or self.trained == "full"):
            raise ConfigError(
                "Of the trunk, only adapters on an emulator's blocks can be tuned here.",
                remedy="Use --tune lora, with a method that has an emulator.",
            )
        self.trainable: dict[str, nn.Parameter] = {}
        """Name in the whole model (PEFT's, for LoRA) -> parameter."""
        self.start = ""
        """A hash of what they started from; empty for the pretrained model."""
        self._beneath: list[tuple[Mapping[str, Tensor], float]] | None = []
        """LoRA that was merged into frozen weights, with its scaling; None after whole weights."""
        self._started: set[str] = set()
        """Weights that a start has changed."""
        here = self._parts()
        for part in here.values():
            part.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            for name in self.parts:
                (self._add_lora if self.trained == "lora" else self._unfreeze)(here[name])

    def _parts(self) -> dict[PartName, Part]:
        """What is here, in the model's order."""
        middle: dict[PartName, Part] = {} if self.emulator is None else {"trunk": self.emulator}
        return {"bottom": self.bottom, **middle, "top": self.top}

    def parameters(self, part: Literal["bottom", "top"] | None = None) -> list[nn.Parameter]:
        """What is trained, of one end or in all."""
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
        # into the blocks alone: PEFT looks for embeddings in whole models, and a part may have none
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
        """What is trained, by name, on the CPU."""
        return {name: parameter.detach().cpu() for name, parameter in self.trainable.items()}

    def save(self, folder: Path, base_model: str) -> None:
        """Writes a PEFT checkpoint, or the weights of all blocks that are tuned; for the owner's eyes alone.

        Args:
            base_model: what PEFT writes into `base_model_name_or_path`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.trained == "full" or self._beneath is None:
            write_tensors(folder / WHOLE, self._whole(), {"format": "pt"})
            return
        tensors, rank, alpha = self.tensors(), self.rank, self.alpha
        if self._beneath:
            tensors, rank = add_lora([*self._beneath, (tensors, alpha / rank)])
            alpha = rank
        write_tensors(folder / ADAPTER, tensors, {"format": "pt"})
        config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=lora_modules(tensors), task_type="CAUSAL_LM",
            base_model_name_or_path=base_model, inference_mode=True,
        )  # fmt: skip
        config.save_pretrained(str(folder))

    def _whole(self) -> dict[str, Tensor]:
        """Weights of all blocks that were trained or started from, with LoRA merged."""
        blocks = self._blocks([self.bottom, self.top])  # an emulator's are no weights of the model
        weights = {name: parameter.detach() for block in blocks for name, parameter in block.items()}
        merged: dict[str, Tensor] = {}
        if self.trained == "lora" and self.trainable:
            merged = merge(self.tensors(), self.alpha / self.rank, weights)
        changed = self._started | set(merged if self.trained == "lora" else self.trainable)
        return {n: merged.get(n, weights[n]) for block in blocks if not changed.isdisjoint(block) for n in block}

    def _blocks(self, parts: Iterable[Part]) -> list[dict[str, nn.Parameter]]:
        """Each block's weights under the whole model's names, without LoRA matrices."""
        found: list[dict[str, nn.Parameter]] = []
        for part in parts:
            blocks, prefix = decoder_of(part.causal).layers, blocks_name(part.causal)
            for index in part.blocks:
                named = {name: p for name, p in blocks[index].named_parameters() if f".{_NAME}." not in name}
                found.append({f"{prefix}.{index}.{n.replace('.base_layer.', '.')}": p for n, p in named.items()})
        return found

    def _changes_emulator(self, names: set[str]) -> bool:
        """Whether any of these weights is of an emulator's block: of those only changes mean something elsewhere."""
        return self.emulator is not None and any(not names.isdisjoint(block) for block in self._blocks([self.emulator]))

    def start_from(self, tensors: Mapping[str, Tensor], scaling: float | None) -> None:
        """Merges tuned weights, as `read_tuned` gives them, into the frozen ones beneath what is trained.

        Raises:
            InvalidTensor: see `merge`; or whole weights, which adapters on an emulator can't be saved with. Nothing has
                changed then.
        """
        blocks = self._blocks(self._parts().values())
        weights = {name: parameter for block in blocks for name, parameter in block.items()}
        updates = merge(tensors, scaling, weights)
        whole = scaling is None or self._beneath is None or self.trained == "full"
        if whole and ("trunk" in self.parts or self._changes_emulator(self._started | set(updates))):
            raise InvalidTensor(
                "Whole weights and adapters on an emulator's blocks don't go into one checkpoint.",
                remedy="Start from a LoRA checkpoint, and tune it with --tune lora.",
            )
        with torch.no_grad():
            for name, tensor in updates.items():
                weights[name].copy_(tensor)
        if scaling is None:
            self._beneath = None
        elif self._beneath is not None:
            self._beneath.append((tensors, scaling))
        self._started |= set(updates)
        self.start = hashlib.sha256(f"{self.start} {tensors_sha256(tensors)} {scaling}".encode()).hexdigest()

    def copy(self, tensors: dict[str, Tensor], source: str) -> None:
        """Takes over tensors by name. Raises `CheckpointError`; nothing has changed then."""
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
    """Starts ends from a checkpoint of any kind, see `Ends.start_from`.

    Raises:
        CheckpointError: a checkpoint of other blocks, or a damaged one. Nothing has changed then.
    """
    try:
        ends.start_from(*read_tuned(folder))
    except InvalidTensor as error:
        raise CheckpointError(f"{folder} doesn't fit: {error.message}", remedy=error.remedy) from None


def read_tuned(folder: Path) -> tuple[dict[str, Tensor], float | None]:
    """The tensors of a checkpoint of either kind, and LoRA's alpha / rank (None for whole weights).

    Raises:
        CheckpointError: neither kind of checkpoint, or a damaged one.
    """
    kind = read_ends(folder)
    whole = kind["trained"] == "full"
    tensors, _ = read_tensors(folder / (WHOLE if whole else ADAPTER))
    return tensors, None if whole else kind["alpha"] / kind["rank"]


def read_run(folder: Path) -> dict[str, Any]:
    """What a checkpoint's `blindtune.json` tells of the run that made it; empty where there is none.

    Raises:
        CheckpointError: a file that was damaged.
    """
    path = folder / SUMMARY
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path} is damaged: it holds no JSON object.",
            remedy="Restore the file; without it, the tuned ends are read alone.",
        )
    return cast("dict[str, Any]", found)


def read_ends(folder: Path) -> dict[str, Any]:
    """Options of `Ends` for a checkpoint that `Ends.save` wrote: trained, parts are the caller's; rank, alpha, targets.

    Raises:
        CheckpointError: neither kind of checkpoint, or a LoRA that is more than its matrices and one scaling.
    """
    if (folder / WHOLE).is_file():
        return {"trained": "full"}
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no {CONFIG} and no {WHOLE}.", remedy="Name a checkpoint's folder.")
    try:
        config = cast("dict[str, Any]", json.loads((folder / CONFIG).read_text()))
        more = [name for name in BEYOND_MATRICES if config.get(name)]
        if more:
            raise CheckpointError(
                f"{folder / CONFIG} has {more[0]} = {config[more[0]]!r}: its matrices don't say all that it changes.",
                remedy="Use a plain LoRA checkpoint, with one rank and one alpha.",
            )
        targets = sorted({str(name).rsplit(".", 1)[-1] for name in config["target_modules"]})
        return {"trained": "lora", "rank": int(config["r"]), "alpha": int(config["lora_alpha"]), "targets": targets}
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder / CONFIG} is no LoRA configuration.", remedy="Use another copy.") from None
