"""Loads the emulators that a server offers, and checks each against the model that it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from blindtune.errors import EmulatorError
from blindtune.models import FrozenBackbone
from blindtune.models.cut.emulator import StoredEmulator, load_emulator
from blindtune.wire import ModelInfo


def load_emulators(folders: Sequence[Path], models: Mapping[str, FrozenBackbone]) -> dict[str, StoredEmulator]:
    """Loads emulators and finds their models by fingerprint.

    Args:
        folders: made by `blindtune emulator build`.
        models: name -> backbone, all that the server hosts.
    Returns:
        Name -> emulator, for the models that have one.
    Raises:
        EmulatorError: a folder holds no emulator, or one that is damaged, or no model is cut as its manifest says, or
            a model has two.
    """
    found: dict[str, StoredEmulator] = {}
    sources = {
        name: (model.fingerprint, model.cut_model.cut) for name, model in models.items() if model.cut_model is not None
    }
    for folder in folders:
        emulator = load_emulator(folder)
        if not sources:
            raise EmulatorError(f"No model is cut here, for the emulator {folder}.", remedy="Serve with --cut.")
        of_it = [name for name, (fingerprint, _) in sources.items() if fingerprint == emulator.manifest.fingerprint]
        for name in of_it or list(sources)[:1]:  # no model fits: `verify` says how the first one differs
            fingerprint, cut = sources[name]
            emulator.verify(fingerprint=fingerprint, cut=cut)
            if name in found:
                raise EmulatorError(f"{folder} is a second emulator of {name!r}.", remedy="Serve one for each model.")
            found[name] = emulator
        emulator.part()  # builds it once: a client would meet its errors later
    return found


def with_emulator(info: ModelInfo) -> ModelInfo:
    """The description of a cut model, with an emulator among its parts. Raises `ValueError` if it isn't cut."""
    if info.cut is None:
        raise ValueError(f"{info.name} is not cut")
    cut = info.cut.model_copy(update={"parts": [*info.cut.parts, "emulator"]})
    return info.model_copy(update={"cut": cut})
