"""Connects the ends of a hosted model to its trunk, or to an emulator, as a design requires."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blindtune.client import Operator, RemoteTrunk, fetch_emulator, fetch_part
from blindtune.data.questions import Fields, TokenizedQuestion
from blindtune.errors import UnknownPart
from blindtune.files import SUMMARY
from blindtune.models import Part
from blindtune.models.backbone import tensors_sha256
from blindtune.models.cut.manifest import Manifest
from blindtune.models.cut.parts import tie
from blindtune.models.devices import find_device
from blindtune.privacy.randomness import SecureGenerator
from blindtune.texts.activation_store import ActivationStore
from blindtune.texts.boundary import LocalTrunk, Trunk
from blindtune.texts.costs import Costs, peak_device_memory, peak_memory
from blindtune.texts.designs import Design, design_options
from blindtune.texts.ends import Ends, Tune, merge_checkpoint
from blindtune.texts.model import CutCausalLM
from blindtune.training.summary import TextsSummary, read_summary

DEFAULT_RANK, DEFAULT_LENGTH = 16, 128


@dataclass(frozen=True)
class Tuning:
    """Options that select which weights of the ends are trained, and what training starts from.

    Args:
        tune: `lora`, or `full` for whole blocks.
        rank, alpha, targets: LoRA's rank, alpha and target modules. Default: α is twice the rank, and the targets are
            all linear layers.
        start: checkpoint whose tuned parts training starts from, such as a bottom that was decorrelated on public
            texts. Default: the pretrained model.
    """

    tune: Tune = "lora"
    rank: int = DEFAULT_RANK
    alpha: int | None = None
    targets: Sequence[str] | None = None
    start: Path | None = None


@dataclass(frozen=True)
class Session:
    """A hosted model that is ready for training with private texts.

    Attributes:
        operator: the server.
        model: the ends and the boundary.
        ends: the ends with the parameters that are trained.
        design: the design that the client follows.
        tuning: options that select the trained weights.
        manifest: the emulator's signed manifest; None without an emulator.
    """

    operator: Operator
    model: CutCausalLM
    ends: Ends
    design: Design
    tuning: Tuning
    manifest: Manifest | None = None

    @property
    def weights_shared(self) -> float:
        """Fraction of the model's weights that is in the bottom and the top."""
        return 0.0 if self.operator.info.cut is None else self.operator.info.cut.weights_shared

    def costs(self) -> Costs:
        """Returns the bytes of all messages of this process, and its peak memory on the CPU and the GPU together."""
        traffic = self.operator.transport.traffic
        memory = peak_memory() + peak_device_memory(self.model.device)
        return Costs(sent=traffic.sent, received=traffic.received, memory=memory)

    def check_room(self, questions: Sequence[TokenizedQuestion]) -> None:
        """Raises `CacheFull` if the hidden states of these texts don't fit in the store. Call it before training."""
        store = self.model.boundary.store
        if store is not None:
            missing = {question.row for question in questions if question.row not in store}
            store.check_room(sum(len(row) for row in missing))

    def summary(self, *, max_length: int, fields: Fields) -> TextsSummary:
        """Returns the content of the run's `blindtune.json`.

        Raises:
            UnknownPart: the server doesn't offer the model's ends.
        """
        info, start = self.operator.info, self.tuning.start
        start_summary = _start_summary(start)
        if info.cut is None:
            raise UnknownPart(
                f"{info.name!r} is not cut on this server.", remedy="The provider has to serve it with --cut."
            )
        return TextsSummary(
            method=self.design.name,
            options=design_options(self.design),
            model=info.name,
            base_model_name=info.base_model_name,
            fingerprint=info.fingerprint,
            max_length=max_length,
            cut=(info.cut.bottom, info.cut.top),
            tune=self.tuning.tune,
            rank=self.ends.rank,
            alpha=self.ends.alpha,
            targets=None if self.ends.targets is None else list(self.ends.targets),
            start=start_summary,
            unknown_start=start is not None and start_summary is None,
            parts=list(self.design.parts),
            fields=_as_json(fields),
            emulator=None if self.manifest is None else self.manifest.model_dump(mode="json"),
        )


def open_session(
    operator: Operator,
    design: Design,
    tuning: Tuning,
    *,
    seed: int = 0,
    device: str = "cpu",
    trusted_key: str | None = None,
    store: Path | None = None,
    store_bytes: int = 2**31,
    key: bytes | None = None,
) -> Session:
    """Fetches the ends of a hosted model, and connects them to its trunk or to an emulator.

    Args:
        seed: seed of LoRA's initial weights.
        device: torch device of the ends and of an emulator.
        trusted_key: public key that must have signed the emulator. None accepts any key.
        store: folder for hidden states that are fetched once. Default: in memory only.
        store_bytes: largest total size of these hidden states in bytes.
        key: see `Boundary`.
    Raises:
        ConfigError: there is no such device, codec or layer.
        UnknownPart: the server doesn't offer a part that the design needs.
        CheckpointError: the checkpoint to start from doesn't fit, or is that of a run with private labels.
    """
    torch_device = find_device(device)
    _start_summary(tuning.start)
    bottom, top = (fetch_part(operator, name).float() for name in ("bottom", "top"))
    tie(bottom, top)
    emulator, manifest = fetch_emulator(operator, trusted_key) if design.emulated else (None, None)
    emulator = None if emulator is None else emulator.float()
    alpha = 2 * tuning.rank if tuning.alpha is None else tuning.alpha
    ends = Ends(
        bottom, top, design.parts, tuning.tune, tuning.rank, alpha, tuning.targets, seed=seed, emulator=emulator
    )
    for part in filter(None, (bottom, top, emulator)):  # LoRA was drawn on the CPU, so it is equal for all devices
        part.to(torch_device)
    if tuning.start is not None:
        merge_checkpoint(ends, tuning.start)
    trunk: Trunk = LocalTrunk(emulator) if emulator else RemoteTrunk(operator, up=design.up, down=design.down)
    hidden = _store(operator, design, bottom, store, store_bytes) if design.stores_activations else None
    boundary = design.boundary(trunk, bottom, store=hidden, key=key or SecureGenerator().key)
    return Session(operator, CutCausalLM(bottom, top, boundary), ends, design, tuning, manifest)


def _start_summary(start: Path | None) -> TextsSummary | None:
    """Returns the summary of the run to start from; None for the pretrained model and for a checkpoint without one."""
    return read_summary(start, TextsSummary) if start is not None and (start / SUMMARY).is_file() else None


def _store(operator: Operator, design: Design, bottom: Part, folder: Path | None, size: int) -> ActivationStore:
    """Returns a store that refuses hidden states of other weights, another bottom, or other options."""
    info = operator.info
    options = sorted(design_options(design).items())
    identity = f"{info.fingerprint} {tensors_sha256(bottom.weights())} {options}"
    return ActivationStore(info.hidden_size, design.down, max_bytes=size, folder=folder, identity=identity)


def _as_json(fields: Fields) -> dict[str, Any]:
    return dict(vars(fields))
