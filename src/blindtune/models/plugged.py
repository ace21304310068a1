"""A split model with tuned ends in the place of its own: the last step of Offline.

Tuned ends travel as checkpoints hold them: LoRA matrices under PEFT's names, or whole weights under the model's own.
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
from blindtune.models.split import PARTS, PartName, SplitModel, blocks_name, decoder_of, layers_of

A, B = ".lora_A.weight", ".lora_B.weight"


def merge(tuned: Mapping[str, Tensor], scaling: float | None, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New weights under the model's names: W + scaling · B A for LoRA, or what was tuned itself.

    Args:
        tuned: as in a checkpoint.
        scaling: alpha / rank; None for whole weights.
        base: the weights of what may be tuned, by name.
    Raises:
        InvalidTensor: names that `base` hasn't, matrices that don't fit, NaN or infinity.
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
                remedy="Use a checkpoint of this model, cut as it is here.",
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidTensor(f"{name!r} holds NaN or infinity.", remedy="Use an earlier checkpoint.")
    if not merged:
        raise InvalidTensor("There are no tuned weights.", remedy="Use a checkpoint of `blindtune train`.")
    return merged


def _with_lora(weight: Tensor | None, a: Tensor, b: Tensor, scaling: float, name: str) -> Tensor:
    if weight is None or a.dim() != 2 or b.dim() != 2 or (b.shape[0], a.shape[1]) != tuple(weight.shape):
        raise InvalidTensor(
            f"LoRA matrices of shapes {tuple(b.shape)} and {tuple(a.shape)} don't fit {name!r}.",
            remedy="Use a checkpoint of this model, cut as it is here.",
        )
    if a.shape[0] != b.shape[1]:
        raise InvalidTensor(f"LoRA matrices of {name!r} have two ranks.", remedy="Send a PEFT checkpoint's tensors.")
    change = scaling * (b.to(weight.device, torch.float32) @ a.to(weight.device, torch.float32))
    return (weight.float() + change).to(weight.dtype)


def add_lora(tuned: Sequence[tuple[Mapping[str, Tensor], float]]) -> tuple[dict[str, Tensor], int]:
    """Several LoRA checkpoints' tensors and scalings as one of scaling 1 that changes weights by their sum; its rank.

    A = [A₁; A₂; …] and B = [s₁ B₁, s₂ B₂, …] for each module, with zeros up to the largest rank that a module has.
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
    """The modules that a LoRA checkpoint's tensors belong to, by their names in the whole model."""
    return sorted(name.removeprefix(PEFT_PREFIX).removesuffix(A) for name in tensors if name.endswith(A))


def tunable_weights(split: SplitModel, parts: Sequence[PartName]) -> dict[str, Tensor]:
    """Weights of these parts' blocks, under the whole model's names."""
    blocks = decoder_of(split.causal).layers
    prefix = blocks_name(split.causal)
    return {
        f"{prefix}.{index}.{name}": tensor.detach()
        for part in parts
        for index in split.parts[part].blocks
        for name, tensor in blocks[index].named_parameters()
    }


def plug_in(split: SplitModel, tuned: Mapping[str, Tensor], scaling: float | None) -> nn.Module:
    """The whole model with tuned ends. It shares everything else with the hosted one: only tuned blocks need memory.

    LoRA may be of any block: clients who tune an emulator have it for some of the trunk's. Whole weights are of the
    ends alone, since of the trunk no client has them.

    Raises:
        InvalidTensor: see `merge`.
    """
    own = tunable_weights(split, ("bottom", "top") if scaling is None else PARTS)
    updates = merge(tuned, scaling, own)
    config = copy.deepcopy(split.config)
    with torch.device("meta"):
        plugged: Any = AutoModelForCausalLM.from_config(config)
    theirs: Any = decoder_of(split.causal)
    blocks, prefix = decoder_of(plugged).layers, blocks_name(plugged)
    for index in range(layers_of(config)):
        here = f"{prefix}.{index}."
        if not any(name.startswith(here) for name in updates):
            blocks[index] = theirs.layers[index]
            continue
        state = {
            name.removeprefix(here): updates.get(name, weight).to(weight)
            for name, weight in own.items()
            if name.startswith(here)
        }
        blocks[index].load_state_dict(state, strict=True, assign=True)
    for name, module in list(theirs.named_children()):
        if name != "layers":
            setattr(decoder_of(plugged), name, module)
    plugged.lm_head = cast(Any, split.causal).lm_head
    return plugged.eval().requires_grad_(False)
