"""Emulators over the network: offered by real servers, checked by the client before anything is computed with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from blindtune.client import Operator, Transport, fetch_emulator, fetch_part
from blindtune.client.trunk import PART_LIMITS
from blindtune.errors import EmulatorError, UnknownPart
from blindtune.models import Cut, FrozenBackbone, load_backbone
from blindtune.models.cut.emulator import WEIGHTS_FILE, load_emulator, make_emulator, save_emulator
from blindtune.models.cut.manifest import public_key
from blindtune.server.host import Host, ServerSettings
from blindtune.wire import PartFile, decode, encode
from tests.conftest import Server
from tests.tiny_causal import save_tiny_causal

KEY = Ed25519PrivateKey.generate()
Change = Callable[[PartFile, dict[str, Tensor]], tuple[PartFile, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, film_sentences) -> dict[str, Path]:
    """Models `llama` and `other`; emulators `float`, `int8`, and `of-other`."""
    root = tmp_path_factory.mktemp("served")
    save_tiny_causal("llama", root / "llama", film_sentences[:200])
    save_tiny_causal("llama", root / "other", film_sentences[:200], seed=1)
    for name, int8 in (("float", False), ("int8", True)):
        make(root / "llama", root / name, KEY, int8=int8)
    make(root / "other", root / "of-other", KEY)
    return {path.name: path for path in root.iterdir()}


def make(model: Path, folder: Path, key: Ed25519PrivateKey, *, keep: int = 2, int8: bool = False) -> FrozenBackbone:
    backbone = load_backbone(str(model), cut=Cut(1, 1))
    save_emulator(folder, make_emulator(backbone.require_cut(), keep), backbone, key, int8=int8)
    return backbone


@pytest.fixture(scope="module")
def server(start_server, folders) -> Iterator[Server]:
    """Hosts the llama with its int8 emulator, and `other` without one."""
    models = [f"{name}={folders[name]}" for name in ("llama", "other")]
    with start_server(models, cut=1, emulator=folders["int8"]) as running:
        yield running


class Tampering(Transport):
    """Somebody between server and client."""

    change: Change

    def fetch(self, path: str) -> bytes:
        message, tensors = decode(super().fetch(path), PartFile, PART_LIMITS)
        return encode(*self.change(message, tensors))


def test_what_arrives_is_what_was_stored_and_int8_travels_as_int8(server, folders):
    operator = Operator(Transport(server.url), "llama")
    assert operator.info.cut is not None
    assert operator.info.cut.parts == ["bottom", "top", "emulator"]
    bottom = fetch_part(operator, "bottom")
    before = operator.transport.traffic.received
    emulator, manifest = fetch_emulator(operator, public_key(KEY))
    received = operator.transport.traffic.received - before
    size = (folders["int8"] / WEIGHTS_FILE).stat().st_size
    assert size <= received < size + 8000  # the manifest and the configuration
    assert manifest == load_emulator(folders["int8"]).manifest
    assert manifest.int8
    ids, lengths = torch.randint(4, 600, (3, 7)), torch.tensor([7, 2, 5])
    hidden = bottom(ids, lengths)
    expected = load_emulator(folders["int8"]).part()(hidden, lengths)
    assert torch.equal(emulator(hidden, lengths), expected)
    assert not any(p.requires_grad for p in emulator.parameters())


def test_a_model_without_an_emulator_offers_none(server):
    operator = Operator(Transport(server.url), "other")
    assert operator.info.cut is not None
    assert operator.info.cut.parts == ["bottom", "top"]
    with pytest.raises(UnknownPart, match="offers no part 'emulator'"):
        fetch_emulator(operator)


def test_a_key_that_the_client_does_not_trust_is_refused(server):
    operator = Operator(Transport(server.url), "llama")
    fetch_emulator(operator)
    with pytest.raises(EmulatorError, match=f"unknown key {public_key(KEY)}"):
        fetch_emulator(operator, public_key(Ed25519PrivateKey.generate()))


def other_weights(message: PartFile, tensors: dict[str, Tensor]) -> tuple[PartFile, dict[str, Tensor]]:
    name = next(name for name in tensors if name.endswith(".values"))
    return message, {**tensors, name: -tensors[name]}


def other_manifest(message: PartFile, tensors: dict[str, Tensor]) -> tuple[PartFile, dict[str, Tensor]]:
    assert message.manifest is not None
    changed = message.manifest.replace('"top": 1', '"top": 2')
    assert changed != message.manifest
    return message.model_copy(update={"manifest": changed}), tensors


def no_manifest(message: PartFile, tensors: dict[str, Tensor]) -> tuple[PartFile, dict[str, Tensor]]:
    return message.model_copy(update={"manifest": None}), tensors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_weights, "tensors have the SHA-256"),
        (other_manifest, "doesn't fit its signature"),
        (no_manifest, "no JSON object"),
    ],
)
def test_what_is_changed_on_its_way_is_refused(server, change, words):
    transport = Tampering(server.url)
    transport.change = change
    with pytest.raises(EmulatorError, match=words):
        fetch_emulator(Operator(transport, "llama"))


@pytest.mark.parametrize(("name", "words"), [("of-other", "made from other weights"), ("cut", "cut at 1 and 1")])
def test_a_whole_emulator_in_place_of_the_right_one_is_refused(server, folders, tmp_path, name, words):
    if name == "cut":
        backbone = load_backbone(str(folders["llama"]), cut=Cut(1, 2))
        save_emulator(tmp_path, make_emulator(backbone.require_cut(), 2), backbone, KEY)
    replacement = load_emulator(tmp_path if name == "cut" else folders[name])
    cut = {"bottom": replacement.cut.bottom, "top": replacement.cut.top}
    transport = Tampering(server.url)
    transport.change = lambda message, _: (
        message.model_copy(update={"manifest": replacement.text, **cut}),
        replacement.tensors,
    )
    with pytest.raises(EmulatorError, match=words):
        fetch_emulator(Operator(transport, "llama"), public_key(KEY))


def test_serve_refuses_the_emulator_of_another_model_and_says_why(start_server, folders):
    with (
        pytest.raises(AssertionError, match=r"(?s)Error:.*made from other weights, of 'other'.*Remedy: Build one from"),
        start_server(folders["llama"], cut=1, emulator=folders["of-other"]),
    ):
        pass


def test_a_host_refuses_emulators_that_fit_no_model(folders, tmp_path):
    whole, cut_backbone = load_backbone(str(folders["llama"])), load_backbone(str(folders["llama"]), cut=Cut(2, 1))
    for models, emulators, words in (
        ({"llama": whole}, [folders["int8"]], "No model is cut here.*--cut"),
        ({"llama": cut_backbone}, [folders["int8"]], "the hosted model is cut at 2 and 1.*--cut 1,1"),
        ({"llama": cut_backbone}, [tmp_path], "holds no emulator"),
        (
            {"llama": load_backbone(str(folders["llama"]), cut=Cut(1, 1))},
            [folders["int8"], folders["float"]],
            "float is a second emulator of 'llama'",
        ),
    ):
        with pytest.raises(EmulatorError, match=words):
            Host(models, ServerSettings(emulators=emulators))
