"""Builds the models with and without tuned parts that an audit compares before the parts are handed over."""

from __future__ import annotations

import copy
from pathlib import Path

from blindtune.client import DeployedModel, Operator, fetch_emulator, fetch_part
from blindtune.errors import ConfigError, UnknownPart
from blindtune.models import Part
from blindtune.models.cut.parts import tie
from blindtune.models.devices import find_device
from blindtune.texts.boundary import Boundary, LocalTrunk
from blindtune.texts.ends import Ends, merge_checkpoint, read_tuned_parts
from blindtune.texts.evaluate import DeployedScorer, Scorer
from blindtune.texts.model import CutCausalLM


def models_around(
    operator: Operator, checkpoint: Path, trunk: bool, *, trusted_key: str | None = None, device: str = "cpu"
) -> tuple[Scorer, Scorer]:
    """Returns the model without and with the tuned parts of a checkpoint.

    Args:
        trunk: whether the server runs both models, with its real trunk. It then gets the tuned parts and sees the
            texts. Otherwise both models run here, with the server's emulator of the trunk.
        trusted_key: public key that must have signed the emulator. None accepts any key.
        device: torch device of the models that run here.
    Raises:
        ConfigError: the server offers no emulator, or there is no such device.
        CheckpointError: the tuned parts belong to another model.
    """
    torch_device = find_device(device)
    if trunk:
        tensors, scaling = read_tuned_parts(checkpoint)
        return DeployedScorer(DeployedModel(operator)), DeployedScorer(DeployedModel(operator, tensors, scaling))
    bottom, top = (fetch_part(operator, name).float() for name in ("bottom", "top"))
    try:
        emulator, _ = fetch_emulator(operator, trusted_key)
    except UnknownPart as error:
        raise ConfigError(error.message, remedy="Use --around trunk, if the server may see the texts.") from None
    before = (bottom, top, emulator.float())
    tuned = copy.deepcopy(before)
    for parts in (before, tuned):
        tie(*parts[:2])
    merge_checkpoint(Ends(*tuned[:2], parts=(), emulator=tuned[2]), checkpoint)
    for part in (*before, *tuned):
        part.to(torch_device)
    return _around_emulator(*before), _around_emulator(*tuned)


def _around_emulator(bottom: Part, top: Part, emulator: Part) -> CutCausalLM:
    return CutCausalLM(bottom, top, Boundary(LocalTrunk(emulator)))
