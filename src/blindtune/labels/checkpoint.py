"""Reads and writes the files in the folder of a run with private labels.

out/
  blindtune.json              model, fingerprint, method and its options, classes, readout, max_length
  adapter_config.json         PEFT's files: in this folder for one adapter, in adapter_0/, adapter_1/, … for several;
  adapter_model.safetensors   under padded LoRA as secret as the labels (mode 600)
  head.safetensors            the client's head; together with the adapters it reveals labels (mode 600)
  secret.safetensors          mixing weights, randomised labels, key: as secret as the labels (mode 600)
  resume.safetensors          state of optimizer and adversary, for --resume (mode 600)
  ledger.jsonl                a record of each message to an operator, written before it is sent (mode 600)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blindtune.client import Backbone
from blindtune.errors import CheckpointError
from blindtune.files import read_tensors, write_tensors
from blindtune.labels.head import HEADS, Head, KernelHead, SketchHead, TwoLayerHead
from blindtune.labels.methods.base import Method
from blindtune.labels.side import SideHead
from blindtune.models.adapters import read_lora_config
from blindtune.privacy.randomness import SecureGenerator
from blindtune.training.summary import LabelsSummary, read_summary
from blindtune.training.trainer import RESUME

RESTORED: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (*HEADS.values(), KernelHead, TwoLayerHead, SketchHead, SideHead)
}
"""Classes of heads that a checkpoint can restore, by name."""
HEAD, SECRET = "head.safetensors", "secret.safetensors"


def adapter_folders(folder: Path, count: int) -> list[Path]:
    """Returns the folder of each adapter."""
    return [folder] if count == 1 else [folder / f"adapter_{index}" for index in range(count)]


def save_adapters(folder: Path, backbone: Backbone, run: str) -> None:
    """Writes the adapters in PEFT's format.

    Args:
        run: id of the run in its ledger; empty without a ledger. Every file of a checkpoint holds it.
    """
    adapters = backbone.lora_adapters()
    for adapter, path in zip(adapters, adapter_folders(folder, len(adapters)), strict=True):
        adapter.save_pretrained(path, run=run)


def save_head(folder: Path, head: nn.Module, run: str) -> None:
    """Writes the head's tensors."""
    weights = {name: tensor.detach().contiguous() for name, tensor in head.state_dict().items()}
    config = {"config": json.dumps(head.config())} if isinstance(head, Head) else {}
    write_tensors(folder / HEAD, weights, {"run": run, **config})


def remove_resume_of_another_run(folder: Path, run: str) -> None:
    """Removes the folder's `resume.safetensors` if an earlier run wrote it."""
    path = folder / RESUME
    if path.is_file() and read_tensors(path)[1].get("run") != run:
        path.unlink()


def save_secret(folder: Path, method: Method, generator: SecureGenerator, run: str) -> None:
    """Writes the method's secrets that predictions need, and the generator's key."""
    key = torch.frombuffer(bytearray(generator.key), dtype=torch.uint8)
    write_tensors(folder / SECRET, {**method.inference_state_dict(), "key": key}, {"run": run})


def load_secret(folder: Path, run: str) -> tuple[dict[str, Tensor], SecureGenerator]:
    """Reads the file that `save_secret` wrote. Raises `CheckpointError` if it is damaged or of another run."""
    secret, metadata = read_tensors(folder / SECRET)
    check_run(folder, run, metadata.get("run"))
    key = secret.pop("key")
    return secret, SecureGenerator(bytes(key.numpy()))


def load_head(folder: Path, summary: LabelsSummary, head: nn.Module | None) -> nn.Module:
    """Reads the trained head.

    Args:
        head: a module of the head's class, needed unless that is one of `RESTORED`.
    Raises:
        CheckpointError: the file is missing, or the head doesn't fit it.
    """
    if head is None and summary.head not in RESTORED:
        raise CheckpointError(f"The head is a {summary.head}.", remedy="Pass head= with a module of that class.")
    weights, metadata = read_tensors(folder / HEAD)
    check_run(folder, summary.run, metadata.get("run"))
    try:
        if head is None:
            kind = RESTORED[summary.head]
            config = json.loads(metadata.get("config", "null"))
            head = kind.build(config) if issubclass(kind, Head) else kind(summary.hidden_size, summary.num_classes)
        head.load_state_dict(weights)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / HEAD} doesn't fit the head: {error}", remedy="Pass the head of this run."
        ) from None
    return head


def head_name(summary: LabelsSummary) -> str | None:
    """Returns the name of a checkpoint's head in `HEADS`; None for a class that isn't there."""
    return next((name for name, kind in HEADS.items() if kind.__name__ == summary.head), None)


def check_run(folder: Path | None, run: str, other: str | None) -> None:
    """Raises `CheckpointError` if files of a folder belong to different runs, whose ledgers count separate budgets."""
    if run != other:
        raise CheckpointError(
            f"{folder} holds files of two runs: the later run was interrupted during its first save.",
            remedy="Train again, in another folder.",
        )


def check_fingerprint(summary: LabelsSummary, backbone: Backbone, folder: Path) -> None:
    """Raises `CheckpointError` if the operators host other weights than those that the checkpoint was trained on."""
    if summary.fingerprint != backbone.info.fingerprint:
        raise CheckpointError(
            f"{folder} was trained on {summary.base_model_name!r} (fingerprint {summary.fingerprint[:12]}…); the "
            f"operators host {backbone.info.base_model_name!r} (fingerprint {backbone.info.fingerprint[:12]}…).",
            remedy="Use operators that host the model that the checkpoint was trained on.",
        )


def check_readout_of(summary: LabelsSummary, backbone: Backbone, folder: Path) -> None:
    """Raises `CheckpointError` if the backbone reads out other hidden states than the head was trained on."""
    if (summary.readout, summary.pairs) != (backbone.readout, backbone.pairs):
        raise CheckpointError(
            f"The head of {folder} reads {summary.readout} with pairs = {summary.pairs!r}; the backbone returns "
            f"{backbone.readout} with pairs = {backbone.pairs!r}.",
            remedy="Create the backbone with the checkpoint's readout, pooling and pairs (`readout_of`).",
        )


def readout_of(summary: LabelsSummary) -> dict[str, Any]:
    """Returns the arguments of `Backbone` that decide what its head reads, from a checkpoint's summary."""
    readout = summary.readout
    return {
        "readout": readout.layers or "last",
        "pooling": readout.pooling,
        "projection": readout.projection,
        "pairs": summary.pairs,
        "codec": summary.codec,
        "max_length": summary.max_length,
    }


def adapter_config(folder: str | Path) -> Any:
    """Returns the `LoraConfig` of a checkpoint; None for a run without adapters."""
    summary = read_summary(folder, LabelsSummary)
    if summary.adapters == 0:
        return None
    return read_lora_config(adapter_folders(Path(folder), summary.adapters)[0])
