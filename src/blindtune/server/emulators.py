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
        folders: folders that `blindtune emulator build` wrote.
        models: all hosted models: name -> backbone.
    Returns:
        The emulators by the name of the hosted model.
    Raises:
        EmulatorError: a folder holds no emulator or a damaged one, no hosted model has the weights and the cut in the
            manifest, or a model has two emulators.
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
        for name in of_it or list(sources)[:1]:  # if none fits, the error is about the first model
            fingerprint, cut = sources[name]
            emulator.verify(fingerprint=fingerprint, cut=cut)
            if name in found:
                raise EmulatorError(f"{folder} is a second emulator of {name!r}.", remedy="Serve one for each model.")
            found[name] = emulator
        emulator.part()  # builds it once, so that an error occurs here and not at a client
    return found


def with_emulator(info: ModelInfo) -> ModelInfo:
    """Returns the description of a cut model with `emulator` among its parts. Raises `ValueError` if it isn't cut."""
    if info.cut is None:
        raise ValueError(f"{info.name} is not cut")
    cut = info.cut.model_copy(update={"parts": [*info.cut.parts, "emulator"]})
    return info.model_copy(update={"cut": cut})
