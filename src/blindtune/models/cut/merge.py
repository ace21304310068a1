"""Merges tuned parts into a cut model: the last step of the design Offline.

Tuned parts have the format of a checkpoint: LoRA matrices under PEFT's names, or whole weights under the model's own.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from blindtune.errors import InvalidTensor
from blindtune.models.adapters import PEFT_PREFIX
from blindtune.models.cut.parts import PARTS, CutModel, PartName, blocks_name, decoder_of, layers_of

A, B = ".lora_A.weight", ".lora_B.weight"


def merge(tuned: Mapping[str, Tensor], scaling: float | None, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns new weights under the model's names: W + scaling · B A for LoRA, or the tuned weights themselves.

    Args:
        tuned: the tensors of a checkpoint.
        scaling: alpha / rank; None for whole weights.
        base: the weights that may be tuned, by name.
    Raises:
        InvalidTensor: a name isn't in `base`, matrices don't fit, or values aren't finite.
    """
    if scaling is None:
        merged = dict(tuned)
    else:
        modules = {name.removesuffix(end) for name in tuned for end in (A, B) if name.endswith(end)}
        left = sorted(set(tuned) - {module + end for module in modules for end in (A, B)})
        left += sorted(module for module in modules if module + A not in tuned or module + B not in tuned)
        if left:
            raise InvalidTensor(f"{left[0]!r} is no pair of LoRA matrices.", remedy="Send a PEFT checkpoint's tensors.")
        merged = {}
        for module in sorted(modules):
            name = f"{module.removeprefix(PEFT_PREFIX)}.weight"
            merged[name] = _with_lora(base.get(name), tuned[module + A], tuned[module + B], scaling, name)
    for name, tensor in merged.items():
        if name not in base or base[name].shape != tensor.shape:
            raise InvalidTensor(
                f"{name!r} of shape {tuple(tensor.shape)} is no weight that may be tuned here.",
                remedy="Use a checkpoint of this model with the same cut.",
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidTensor(f"{name!r} holds NaN or infinity.", remedy="Use an earlier checkpoint.")
    if not merged:
        raise InvalidTensor("There are no tuned weights.", remedy="Use a checkpoint of `blindtune texts train`.")
    return merged


def _with_lora(weight: Tensor | None, a: Tensor, b: Tensor, scaling: float, name: str) -> Tensor:
    """Returns W + scaling · B A, computed in float32, in the dtype of W. Raises `InvalidTensor`."""
    if weight is None or a.dim() != 2 or b.dim() != 2 or (b.shape[0], a.shape[1]) != tuple(weight.shape):
        raise InvalidTensor(
            f"LoRA matrices of shapes {tuple(b.shape)} and {tuple(a.shape)} don't fit {name!r}.",
            remedy="Use a checkpoint of this model with the same cut.",
        )
    if a.shape[0] != b.shape[1]:
        raise InvalidTensor(f"LoRA matrices of {name!r} have two ranks.", remedy="Send a PEFT checkpoint's tensors.")
    change = scaling * (b.to(weight.device, torch.float32) @ a.to(weight.device, torch.float32))
    return (weight.float() + change).to(weight.dtype)


def add_lora(tuned: Sequence[tuple[Mapping[str, Tensor], float]]) -> tuple[dict[str, Tensor], int]:
    """Combines several LoRA checkpoints into one whose update is the sum of theirs.

    For each module A = [A₁; A₂; …] and B = [s₁ B₁, s₂ B₂, …], padded with zeros to the largest rank of any module.

    Args:
        tuned: tensors and scaling of each checkpoint.
    Returns:
        The tensors of the combined checkpoint, for scaling 1, and their rank.
    """
    pieces: defaultdict[str, list[Tensor]] = defaultdict(list)
    for tensors, scaling in tuned:
        for name, tensor in tensors.items():
            factor = 1 if name.endswith(A) else scaling
            pieces[PEFT_PREFIX + name.removeprefix(PEFT_PREFIX)].append(factor * tensor.float())
    joined = {name: torch.cat(some, 0 if name.endswith(A) else 1) for name, some in pieces.items()}
    rank = max(tensor.shape[0] for name, tensor in joined.items() if name.endswith(A))
    for name, tensor in joined.items():
        joined[name] = F.pad(tensor, (0, 0, 0, rank - len(tensor)) if name.endswith(A) else (0, rank - tensor.shape[1]))
    return joined, rank


def lora_modules(tensors: Iterable[str]) -> list[str]:
    """Returns the modules that a LoRA checkpoint changes, by their names in the whole model, sorted."""
    return sorted(name.removeprefix(PEFT_PREFIX).removesuffix(A) for name in tensors if name.endswith(A))


def tunable_weights(cut_model: CutModel, parts: Sequence[PartName]) -> dict[str, Tensor]:
    """Returns the weights of these parts' blocks, under the whole model's names."""
    blocks = decoder_of(cut_model.causal).layers
    prefix = blocks_name(cut_model.causal)
    return {
        f"{prefix}.{index}.{name}": tensor.detach()
        for part in parts
        for index in cut_model.parts[part].blocks
        for name, tensor in blocks[index].named_parameters()
    }


def with_tuned_parts(cut_model: CutModel, tuned: Mapping[str, Tensor], scaling: float | None) -> nn.Module:
    """Returns the whole model with tuned parts.

    It shares all other modules with the hosted model, so only tuned blocks need memory. LoRA may change any block:
    clients that tune an emulator have LoRA matrices for some blocks of the trunk. Whole weights may replace the bottom
    and the top alone, since no client has those of the trunk.

    Raises:
        InvalidTensor: see `merge`.
    """
    tunable = tunable_weights(cut_model, ("bottom", "top") if scaling is None else PARTS)
    updates = merge(tuned, scaling, tunable)
    config = copy.deepcopy(cut_model.config)
    with torch.device("meta"):
        whole: Any = AutoModelForCausalLM.from_config(config)
    hosted: Any = decoder_of(cut_model.causal)
    blocks, prefix = decoder_of(whole).layers, blocks_name(whole)
    for index in range(layers_of(config)):
        block_prefix = f"{prefix}.{index}."
        if not any(name.startswith(block_prefix) for name in updates):
            blocks[index] = hosted.layers[index]
            continue
        state = {
            name.removeprefix(block_prefix): updates.get(name, weight).to(weight)
            for name, weight in tunable.items()
            if name.startswith(block_prefix)
        }
        blocks[index].load_state_dict(state, strict=True, assign=True)
    for name, module in list(hosted.named_children()):
        if name != "layers":
            setattr(decoder_of(whole), name, module)
    whole.lm_head = cast(Any, cut_model.causal).lm_head
    return whole.eval().requires_grad_(False)
