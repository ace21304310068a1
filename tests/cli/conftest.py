"""What tests of commands share."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from blindtune.models import Cut, load_backbone
from blindtune.models.cut.emulator import make_emulator, save_emulator


@pytest.fixture(scope="module")
def emulated(start_server, tiny_causal, tmp_path_factory):
    """A recording server with an emulator of its trunk: `(server, folder, key)`."""
    folder = tmp_path_factory.mktemp("emulated")
    backbone = load_backbone(str(tiny_causal["llama"]), cut=Cut(1, 1))
    key = Ed25519PrivateKey.generate()
    assert backbone.cut_model is not None
    stored = save_emulator(folder / "emulator", make_emulator(backbone.cut_model, 2), backbone, key, int8=True)
    options = {"cut": 1, "emulator": folder / "emulator", "record": folder / "seen"}
    with start_server(tiny_causal["llama"], **options) as server:
        yield server, folder / "seen", stored.manifest.public_key
