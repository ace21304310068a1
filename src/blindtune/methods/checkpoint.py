"""What a training run leaves behind, and how it is read again.

out/
  blindtune.json              model, fingerprint, method and its options, classes, pooling, max_length
  adapter_config.json         PEFT's files: here for one adapter, in adapter_0/, adapter_1/, … for several;
  adapter_model.safetensors   under p3eft as secret as the labels (mode 600)
  head.safetensors            the client's head; with the adapters it tells labels (mode 600)
  secret.safetensors          mixing weights, randomised labels, key: as secret as the labels (mode 600)
  resume.safetensors          optimizer and adversary, for --resume (mode 600)
  ledger.jsonl                what operators were sent, written before it was sent (mode 600)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blindtune.client import Backbone
from blindtune.errors import CheckpointError, ConfigError
from blindtune.files import replace_file
from blindtune.methods.distance_correlation import DistanceCorrelation
from blindtune.methods.head import LinearHead
from blindtune.methods.head_only import HeadOnly
from blindtune.methods.lora import LoRA
from blindtune.methods.model import Method, PrivateModel
from blindtune.methods.p3eft import P3EFT
from blindtune.methods.p3eft_published import PublishedP3EFT
from blindtune.methods.pslf import PSLF
from blindtune.methods.randomized_response import RandomizedResponse
from blindtune.methods.state import SUMMARY, read_tensors, under, write_tensors
from blindtune.models.adapters import read_lora_config
from blindtune.privacy.ledger import JOURNAL, read_journal_of
from blindtune.privacy.randomness import SecureGenerator

HEAD, SECRET, RESUME = "head.safetensors", "secret.safetensors", "resume.safetensors"
METHODS: dict[str, type[LoRA]] = {
    m.name: m for m in (LoRA, HeadOnly, P3EFT, PublishedP3EFT, DistanceCorrelation, PSLF, RandomizedResponse)
}
FORMAT = 3
RESUME_ONLY = ("adversary.", "joint_adversary.")
"""Method state under these prefixes is needed to go on training, not to predict."""


def method_class(name: str) -> type[LoRA]:
    """A method's class by name.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in METHODS:
        raise ConfigError(f"There is no method {name!r}.", remedy=f"Use one of: {', '.join(METHODS)}.")
    return METHODS[name]


def make_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """A method by name, with options of its class.

    Raises:
        ConfigError: an unknown name or option.
    """
    cls = method_class(name)
    known = {field.name for field in fields(cls) if field.init}
    unknown = set(options or {}) - known
    if unknown:
        raise ConfigError(f"{name} has no option {sorted(unknown)}.", remedy=f"It has: {', '.join(sorted(known))}.")
    return cls(**(options or {}))


def save_model(
    model: PrivateModel,
    folder: str | Path,
    *,
    classes: list[str] | None = None,
    resume: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the checkpoint; each file replaces its predecessor in one step.

    Args:
        resume: further tensors of a run under way; `resume.safetensors` is left out without them.
    """
    model.check_backbone()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    backbone, method, run = model.backbone, model.method, model.ledger_run
    adapters = backbone.lora_adapters()
    for adapter, place in zip(adapters, _adapter_folders(folder, len(adapters)), strict=True):
        adapter.save_pretrained(place, run=run)
    head = {name: tensor.detach().contiguous() for name, tensor in model.head.state_dict().items()}
    write_tensors(folder / HEAD, head, {"run": run})
    _save_secret(model, folder)
    if method.ledger is not None:
        method.ledger.attach(folder)
    if resume is not None:
        learned = {f"method.{name}": tensor for name, tensor in method.state().items()}
        write_tensors(folder / RESUME, {**learned, **resume}, {"run": run})
    elif (folder / RESUME).is_file() and read_tensors(folder / RESUME)[1].get("run") != run:
        (folder / RESUME).unlink()  # of a run that was here before
    options = {f.name: getattr(method, f.name) for f in fields(METHODS[method.name]) if f.init}
    summary = {
        "format": FORMAT,
        "model": backbone.info.name,
        "base_model_name": backbone.info.base_model_name,
        "fingerprint": backbone.info.fingerprint,
        "hidden_size": backbone.hidden_size,
        "pooling": backbone.pooling,
        "max_length": backbone.max_length,
        "method": method.name,
        "options": options,
        "run": run,
        "adapters": len(adapters),
        "seed": model.seed,
        "head": type(model.head).__name__,
        "num_classes": model.classes,
        "classes": classes or [str(index) for index in range(model.classes)],
    }
    replace_file(folder / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())


def _save_secret(model: PrivateModel, folder: Path) -> None:
    secret = {name: tensor for name, tensor in model.method.state().items() if not name.startswith(RESUME_ONLY)}
    secret["key"] = torch.frombuffer(bytearray(model.generator.key), dtype=torch.uint8)
    write_tensors(folder / SECRET, secret, {"run": model.ledger_run})


def read_summary(folder: str | Path) -> dict[str, Any]:
    """`blindtune.json`.

    Raises:
        CheckpointError: it isn't there or isn't ours.
    """
    path = Path(folder) / SUMMARY
    if not path.is_file():
        raise CheckpointError(f"There is no {path}.", remedy="Name a folder that `blindtune train` wrote.")
    try:
        summary = json.loads(path.read_text())
        if summary["format"] != FORMAT:
            raise KeyError
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{path} is not a checkpoint of this version.",
            remedy="Train again. Pads and shares of earlier versions told more than they said (CHANGELOG.md).",
        ) from None
    return summary


def check_fingerprint(summary: Mapping[str, Any], backbone: Backbone, folder: Path) -> None:
    """Raises `CheckpointError` if the checkpoint was trained on other weights than the operators host."""
    if summary["fingerprint"] != backbone.info.fingerprint:
        raise CheckpointError(
            f"{folder} was trained on {summary['base_model_name']!r} (fingerprint {summary['fingerprint'][:12]}…); the "
            f"operators host {backbone.info.base_model_name!r} (fingerprint {backbone.info.fingerprint[:12]}…).",
            remedy="Use operators that host the model it was trained on.",
        )


def check_run(folder: Path, run: str, other: str | None) -> None:
    """Raises `CheckpointError` if files of a folder are of different runs: their journals count different budgets."""
    if run != other:
        raise CheckpointError(
            f"{folder} holds files of two runs: the later one was broken off while it saved for the first time.",
            remedy="Train again, in another folder.",
        )


def load_model(
    folder: str | Path, backbone: Backbone, *, head: torch.nn.Module | None = None, predict_only: bool = False
) -> PrivateModel:
    """The trained model again, over operators that host the same weights .

    Args:
        head: a module of the head's class, if it isn't a `LinearHead`.
        predict_only: see `PrivateModel`.
    Raises:
        CheckpointError: missing files, another model, or a head that doesn't fit.
    """
    folder = Path(folder)
    summary = read_summary(folder)
    check_fingerprint(summary, backbone, folder)
    secret, facts = read_tensors(folder / SECRET)
    check_run(folder, summary["run"], facts.get("run"))
    key = secret.pop("key")
    if head is None:
        if summary["head"] != "LinearHead":
            raise CheckpointError(f"The head is a {summary['head']}.", remedy="Pass head= with a module of that class.")
        head = LinearHead(summary["hidden_size"], summary["num_classes"])
    try:
        weights, facts = read_tensors(folder / HEAD)
        check_run(folder, summary["run"], facts.get("run"))
        head.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder / HEAD} doesn't fit the head: {error}", remedy="Pass the head of this run."
        ) from None
    if summary["run"]:
        read_journal_of(folder.resolve() / JOURNAL, summary["run"])  # before a backbone is taken
    method = make_method(summary["method"], summary["options"])
    generator = SecureGenerator(bytes(key.numpy()))
    model = PrivateModel(backbone, head, method, generator=generator, seed=summary["seed"], predict_only=predict_only)
    method.load_state(secret)
    if method.ledger is not None:
        method.ledger.resume(folder, summary["run"])
    bounded = math.isfinite(method.label_mu)  # then an error would tell something; zeros are sent
    for adapter, place in zip(backbone.lora_adapters(), _adapter_folders(folder, summary["adapters"]), strict=True):
        check_run(folder, summary["run"], adapter.load_pretrained(place, allow_nonfinite=bounded))
    return model


def read_resume(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Method state and the other tensors that `save_model(resume=…)` wrote.

    Raises:
        CheckpointError: the folder holds no run that can go on.
    """
    tensors, facts = read_tensors(Path(folder) / RESUME)
    check_run(Path(folder), read_summary(folder)["run"], facts.get("run"))
    return under("method.", tensors), {
        name: tensor for name, tensor in tensors.items() if not name.startswith("method.")
    }


def adapter_config(folder: str | Path) -> Any:
    """The `LoraConfig` of a checkpoint; None for a run without adapters."""
    summary = read_summary(folder)
    if summary["adapters"] == 0:
        return None
    return read_lora_config(_adapter_folders(Path(folder), summary["adapters"])[0])


def _adapter_folders(folder: Path, count: int) -> list[Path]:
    return [folder] if count == 1 else [folder / f"adapter_{index}" for index in range(count)]
