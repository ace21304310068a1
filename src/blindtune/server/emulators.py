"""The emulators that a server offers: each checked, at the start, against the model that is hosted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from blindtune.errors import EmulatorError
from blindtune.models import FrozenBackbone
from blindtune.models.emulator import StoredEmulator, load_emulator
from blindtune.wire import ModelInfo


def load_emulators(folders: Sequence[Path], models: Mapping[str, FrozenBackbone]) -> dict[str, StoredEmulator]:
    """Model's name -> its emulator.

    Raises:
        EmulatorError: a folder without an emulator, or with one that is damaged or of no split model here.
    """
    found: dict[str, StoredEmulator] = {}
    sources = {name: (model.fingerprint, model.split.cut) for name, model in models.items() if model.split is not None}
    for folder in folders:
        emulator = load_emulator(folder)
        if not sources:
            raise EmulatorError(f"No model is split here, for the emulator {folder}.", remedy="Serve with --split.")
        of_it = [name for name, (fingerprint, _) in sources.items() if fingerprint == emulator.manifest.fingerprint]
        for name in of_it or list(sources)[:1]:  # the first one, to say how it differs
            fingerprint, cut = sources[name]
            emulator.verify(fingerprint=fingerprint, cut=cut)
            if name in found:
                raise EmulatorError(f"{folder} is a second emulator of {name!r}.", remedy="Serve one for each model.")
            found[name] = emulator
        emulator.part()  # raises now what clients would run into
    return found


def with_emulator(info: ModelInfo) -> ModelInfo:
    """The description of a split model that has an emulator."""
    if info.split is None:
        raise ValueError(f"{info.name} is not split")
    split = info.split.model_copy(update={"parts": [*info.split.parts, "emulator"]})
    return info.model_copy(update={"split": split})
