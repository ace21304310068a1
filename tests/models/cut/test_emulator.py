"""Emulators: which blocks stay, what they compute, what is stored of them, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import stat
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from blindtune.errors import ConfigError, EmulatorError
from blindtune.models import Cut, CutModel, FrozenBackbone, load_backbone
from blindtune.models.cut.emulator import (
    MANIFEST_FILE,
    WEIGHTS_FILE,
    StoredEmulator,
    kept_layers,
    load_emulator,
    make_emulator,
    save_emulator,
    stored_tensors,
)
from blindtune.models.cut.manifest import public_key, sign_manifest, signing_key
from blindtune.models.cut.parts import decoder_of
from tests.tiny import VOCABULARY
from tests.tiny_causal import save_tiny_causal

FAMILIES = ("llama", "opt", "qwen2")
CUT = Cut(2, 2)
LAYERS = 9
Load = Callable[..., FrozenBackbone]


@pytest.fixture(scope="module")
def cut_backbone(tmp_path_factory: pytest.TempPathFactory, film_sentences: list[str]) -> Load:
    """`cut_backbone(family, dtype="float32", seed=0)`: nine blocks, of which the trunk has 2 … 6."""

    def load(family: str, dtype: str = "float32", seed: int = 0) -> FrozenBackbone:
        folder = tmp_path_factory.mktemp(family)
        save_tiny_causal(family, folder, film_sentences[:200], seed=seed, layers=LAYERS)
        return load_backbone(str(folder), dtype=dtype, cut=CUT)

    return cache(load)


@pytest.fixture(scope="module")
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@pytest.fixture
def saved(cut_backbone: Load, key: Ed25519PrivateKey, tmp_path: Path) -> Path:
    """A folder with an emulator of the llama."""
    backbone = cut_backbone("llama")
    save_emulator(tmp_path / "emulator", make_emulator(backbone.require_cut(), 3), backbone, key)
    return tmp_path / "emulator"


def smashed(backbone: FrozenBackbone) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states `(4, 11, d)` at the trunk's input, and lengths."""
    ids = torch.randint(4, VOCABULARY, (4, 11), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([11, 3, 1, 8])
    return backbone.require_cut().parts["bottom"](ids, lengths), lengths


def source(backbone: FrozenBackbone) -> dict[str, Any]:
    return {"fingerprint": backbone.fingerprint, "cut": backbone.require_cut().cut}


def edit(folder: Path, **fields: object) -> None:
    """Changes the manifest behind its signature's back."""
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def sign_again(folder: Path, key: Ed25519PrivateKey, **fields: object) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(sign_manifest({**without_signature(path), **fields}, key))


def without_signature(path: Path) -> dict[str, Any]:
    return {k: v for k, v in json.loads(path.read_text()).items() if k not in ("signature", "public_key", "format")}


# Which blocks stay.


def test_kept_layers_are_spread_over_the_trunk():
    assert kept_layers(26, 10) == [0, 3, 6, 8, 11, 14, 17, 19, 22, 25]
    assert kept_layers(5, 3) == [0, 2, 4]
    assert kept_layers(5, 1) == [0]
    assert kept_layers(1, 1) == [0]


@given(st.integers(2, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(2, n))))
def test_kept_layers_are_different_ones_with_both_ends(sizes: tuple[int, int]):
    n, j = sizes
    kept = kept_layers(n, j)
    assert len(kept) == j
    assert kept == sorted(set(kept))
    assert (kept[0], kept[-1]) == (0, n - 1)
    gaps = [b - a for a, b in pairwise(kept)]
    assert max(gaps) - min(gaps) <= 2  # rounding moves each index by at most a half


@pytest.mark.parametrize("j", [0, -1, 6])
def test_numbers_that_a_trunk_cannot_keep_are_refused(j: int):
    with pytest.raises(ConfigError, match=f"An emulator of {j} layers, of a trunk of 5"):
        kept_layers(5, j)


# What they compute.


@pytest.mark.parametrize("family", FAMILIES)
def test_an_emulator_that_keeps_all_is_the_trunk_bit_for_bit(cut_backbone: Load, family: str):
    backbone = cut_backbone(family)
    hidden, lengths = smashed(backbone)
    emulator = make_emulator(backbone.require_cut(), LAYERS - 4)
    assert torch.equal(emulator(hidden, lengths), backbone.require_cut().parts["trunk"](hidden, lengths))


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_blocks_is_what_a_shallower_model_computes(cut_backbone: Load, family: str):
    backbone = cut_backbone(family)
    cut_model = backbone.require_cut()
    emulator = make_emulator(cut_model, 2)
    assert list(emulator.blocks) == [2, 6]
    remaining = [0, 1, 2, 6, 7, 8]
    config = copy.deepcopy(cut_model.config)
    config.num_hidden_layers = len(remaining)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: len(remaining)]
    shallow = AutoModelForCausalLM.from_config(config).eval()
    weights = {name: w for name, w in cut_model.causal.state_dict().items() if ".layers." not in name}
    decoder_of(shallow).layers.load_state_dict(
        {
            f"{new}.{name}": w
            for new, old in enumerate(remaining)
            for name, w in decoder_of(cut_model.causal).layers[old].state_dict().items()
        }
    )
    assert not shallow.load_state_dict(weights, strict=False).unexpected_keys
    ids = torch.randint(4, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([9, 9])
    hidden = emulator(cut_model.parts["bottom"](ids, lengths), lengths)
    with torch.no_grad():
        logits = cut_model.parts["top"].logits(cut_model.parts["top"](hidden, lengths))
        torch.testing.assert_close(logits, shallow(ids).logits, rtol=1e-5, atol=1e-5)


def test_an_emulator_is_a_copy(cut_backbone: Load):
    backbone = cut_backbone("llama")
    before = [w.clone() for w in backbone.model.state_dict().values()]
    emulator = make_emulator(backbone.require_cut(), 3)
    with torch.no_grad():
        for parameter in emulator.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, backbone.model.state_dict().values(), strict=True))


def test_an_emulator_passes_gradients_on_to_the_bottom(cut_backbone: Load):
    backbone = cut_backbone("llama")
    hidden, lengths = smashed(backbone)
    leaf = hidden.detach().requires_grad_()
    make_emulator(backbone.require_cut(), 2)(leaf, lengths)[1, 2].sum().backward()
    assert leaf.grad is not None
    assert leaf.grad[1, :3].abs().sum() > 0
    assert leaf.grad[[0, 2, 3]].abs().sum() == 0


# What is stored.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stored_emulator_comes_back_bit_for_bit(
    cut_backbone: Load, key: Ed25519PrivateKey, tmp_path: Path, family: str, dtype: str
):
    backbone = cut_backbone(family, dtype)
    hidden, lengths = smashed(backbone)
    emulator = make_emulator(backbone.require_cut(), 3)
    save_emulator(tmp_path, emulator, backbone, key)
    stored = load_emulator(tmp_path)
    stored.verify(**source(backbone), trusted_key=public_key(key))
    loaded = stored.part()
    assert torch.equal(loaded(hidden, lengths), emulator(hidden, lengths))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert stored.manifest.blocks == [2, 4, 6]
    assert stored.manifest.parameters == sum(p.numel() for p in emulator.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_is_off_by_at_most_half_a_step_of_its_row(
    cut_backbone: Load, key: Ed25519PrivateKey, tmp_path: Path, family: str
):
    backbone = cut_backbone(family)
    emulator = make_emulator(backbone.require_cut(), 3)
    save_emulator(tmp_path, emulator, backbone, key, int8=True)
    loaded = load_emulator(tmp_path).part().weights()
    rounded = 0
    for name, weight in emulator.weights().items():
        if weight.ndim == 2:
            bound = weight.abs().amax(1, keepdim=True) / 254 * 1.002
            assert bool(((loaded[name] - weight).abs() <= bound).all()), name
            rounded += not torch.equal(loaded[name], weight)
        else:
            assert torch.equal(loaded[name], weight), name  # norms and biases
    assert rounded == sum(weight.ndim == 2 for weight in emulator.weights().values())


def test_int8_rows_of_very_different_sizes_keep_their_own_scale(cut_backbone: Load):
    emulator = make_emulator(cut_backbone("llama").require_cut(), 1)
    name = next(name for name, weight in emulator.weights().items() if weight.ndim == 2)
    weight = emulator.weights()[name]
    with torch.no_grad():
        weight.mul_(torch.logspace(-3, 1, len(weight)).unsqueeze(1))
    tensors = stored_tensors(emulator, dtype=torch.float32, int8=True)
    assert tensors[f"{name}.values"].shape == weight.shape
    assert tensors[f"{name}.scales"].shape == (len(weight), 1)
    assert int(tensors[f"{name}.values"].abs().amax(1).min()) >= 126  # each row uses all levels


def test_int8_takes_a_quarter_of_the_bytes():
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
    )
    cut_model = CutModel.of(LlamaForCausalLM(config).eval().requires_grad_(False), Cut(1, 1))
    sizes = [
        sum(t.nbytes for t in stored_tensors(make_emulator(cut_model, 2), dtype=torch.float32, int8=int8).values())
        for int8 in (False, True)
    ]
    assert sizes[0] / sizes[1] > 3.9


def test_the_manifest_tells_nothing_of_the_providers_disk(saved: Path, cut_backbone: Load):
    text = (saved / MANIFEST_FILE).read_text()
    assert cut_backbone("llama").source.location not in text
    assert str(saved.parent) not in text


# What is refused.


CHANGES: list[tuple[str, object]] = [
    ("fingerprint", "0" * 64),
    ("bottom", 1),
    ("blocks", [2, 3, 6]),
    ("config", {"model_type": "llama"}),
    ("dtype", "float16"),
    ("int8", True),
    ("parameters", 1),
    ("distillation", None),
    ("weights_sha256", "0" * 64),
    ("tensors_sha256", "0" * 64),
    ("public_key", "0" * 64),
    ("signature", "0" * 128),
    ("note", "added"),
]


@pytest.mark.parametrize(("field", "value"), CHANGES, ids=[field for field, _ in CHANGES])
def test_a_manifest_that_was_changed_is_refused(saved: Path, field: str, value: object):
    if field == "distillation":
        value = {"steps": 1}
    edit(saved, **{field: value})
    with pytest.raises(EmulatorError, match="manifest doesn't fit its signature"):
        load_emulator(saved)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": NaN}', "[" * 100_000])
def test_a_manifest_that_is_none_is_refused(saved: Path, text: str):
    (saved / MANIFEST_FILE).write_text(text)
    with pytest.raises(EmulatorError, match="manifest"):
        load_emulator(saved)


@pytest.mark.parametrize("signature", [None, 7, "zz", "00"])
def test_a_manifest_without_a_proper_signature_is_refused(saved: Path, signature: object):
    edit(saved, signature=signature)
    with pytest.raises(EmulatorError, match="signature"):
        load_emulator(saved)


def test_a_signed_manifest_that_lacks_a_field_is_refused_by_the_fields_name(saved: Path, key: Ed25519PrivateKey):
    path = saved / MANIFEST_FILE
    fields = without_signature(path)
    del fields["blocks"]
    path.write_text(sign_manifest(fields, key))
    with pytest.raises(EmulatorError, match="no valid blocks"):
        load_emulator(saved)


def test_another_format_is_refused_with_its_number(saved: Path):
    edit(saved, format=2)
    with pytest.raises(EmulatorError, match="format 2; this version reads 1"):
        load_emulator(saved)


@pytest.mark.parametrize("position", [0, 40, -1], ids=["length", "header", "weights"])
def test_weights_with_one_other_byte_are_refused(saved: Path, position: int):
    path = saved / WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(EmulatorError, match=r"weights in .* SHA-256 .* tampered with"):
        load_emulator(saved)


def test_other_tensors_under_a_good_manifest_are_refused(saved: Path):
    tensors = load_file(saved / WEIGHTS_FILE)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    text = (saved / MANIFEST_FILE).read_text()
    StoredEmulator.of(text, tensors)
    for changed in (
        {**tensors, name: tensors[name] + 1},
        {**tensors, "more": torch.zeros(1)},
        {key: tensor for key, tensor in tensors.items() if key != name},
        {**tensors, name: tensors[name].flatten()},
    ):
        with pytest.raises(EmulatorError, match="tensors have the SHA-256"):
            StoredEmulator.of(text, changed)


def test_the_emulator_of_another_model_is_refused_by_its_name(saved: Path, cut_backbone: Load):
    other = cut_backbone("llama", seed=1)
    with pytest.raises(EmulatorError, match=rf"made from other weights.*{other.fingerprint[:12]}"):
        load_emulator(saved).verify(**source(other))


def test_the_emulator_of_another_cut_is_refused(saved: Path, cut_backbone: Load):
    with pytest.raises(EmulatorError, match="a bottom of 2 and a top of 2 blocks; the hosted model is cut at 2 and 3"):
        load_emulator(saved).verify(fingerprint=cut_backbone("llama").fingerprint, cut=Cut(2, 3))


def test_an_unknown_key_is_refused_where_one_is_trusted(saved: Path, cut_backbone: Load, key: Ed25519PrivateKey):
    backbone = cut_backbone("llama")
    load_emulator(saved).verify(**source(backbone), trusted_key=public_key(key).upper())
    stranger = Ed25519PrivateKey.generate()
    sign_again(saved, stranger)
    forged = load_emulator(saved)
    forged.verify(**source(backbone))  # any key will do for those who trust none in particular
    with pytest.raises(EmulatorError, match=f"unknown key {public_key(stranger)}"):
        forged.verify(**source(backbone), trusted_key=public_key(key))


@pytest.mark.parametrize("blocks", [[1, 4, 6], [2, 4, 7], [4, 2, 6], [2, 2, 6], [2, 6]])
def test_signed_blocks_that_do_not_fit_are_refused(saved: Path, key: Ed25519PrivateKey, blocks: list[int]):
    sign_again(saved, key, blocks=blocks)
    with pytest.raises(EmulatorError):
        load_emulator(saved).part()


@pytest.mark.parametrize("config", [{}, {"model_type": "bert"}, {"model_type": "llama", "num_hidden_layers": "x"}])
def test_a_signed_configuration_of_no_known_decoder_is_refused(
    saved: Path, key: Ed25519PrivateKey, config: dict[str, object]
):
    sign_again(saved, key, config=config)
    with pytest.raises(EmulatorError):
        load_emulator(saved).part()


@pytest.mark.parametrize("name", [MANIFEST_FILE, WEIGHTS_FILE])
def test_a_folder_without_one_of_the_files_is_named(saved: Path, name: str):
    (saved / name).unlink()
    with pytest.raises(EmulatorError, match=rf"{saved} holds no emulator: .*{name}"):
        load_emulator(saved)


def test_a_signed_file_that_is_no_safetensors_is_refused(saved: Path, key: Ed25519PrivateKey):
    (saved / WEIGHTS_FILE).write_bytes(b"garbage")
    sign_again(saved, key, weights_sha256=hashlib.sha256(b"garbage").hexdigest())
    with pytest.raises(EmulatorError, match="can't be read"):
        load_emulator(saved)


def test_int8_tensors_that_lack_their_scales_are_refused(cut_backbone: Load, key: Ed25519PrivateKey, tmp_path: Path):
    backbone = cut_backbone("llama")
    stored = save_emulator(tmp_path, make_emulator(backbone.require_cut(), 2), backbone, key, int8=True)
    scales = next(name for name in stored.tensors if name.endswith(".scales"))
    less = {name: tensor for name, tensor in stored.tensors.items() if name != scales}
    save_file(less, tmp_path / WEIGHTS_FILE)
    with pytest.raises(EmulatorError, match="don't fit its manifest"):
        StoredEmulator(stored.manifest, stored.text, less).part()


# Keys.


def test_a_key_is_made_once_for_its_owner_only(tmp_path: Path):
    path = tmp_path / "keys" / "provider.pem"
    made = signing_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert public_key(signing_key(path)) == public_key(made)


def test_other_keys_are_refused(tmp_path: Path):
    path = tmp_path / "key.pem"
    path.write_text("secret")
    with pytest.raises(ConfigError, match="can't be read as a key"):
        signing_key(path)
    rsa = generate_private_key(65537, 2048)
    path.write_bytes(rsa.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(ConfigError, match="a key of another kind, RSA"):
        signing_key(path)
