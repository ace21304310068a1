"""The signed manifest of an emulator: its source model, cut, kept blocks, and distillation.

    {"format": 1, "fingerprint": …, "bottom": 2, "top": 2, "blocks": […], …, "public_key": …, "signature": …}

The signature is Ed25519 over the canonical JSON of all other fields: sorted keys, no spaces, ASCII.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, StringConstraints, ValidationError

from blindtune.errors import ConfigError, EmulatorError
from blindtune.files import PRIVATE, replace_file
from blindtune.models.cut.parts import Cut

FORMAT = 1
Hex32 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Hex64 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]


class Losses(BaseModel):
    """Mean losses on held-out public text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lm_loss: float
    """Cross entropy in nats per predicted token."""
    mse: float
    """||emulator − trunk||² / ||trunk||² at the trunk's output, mean over tokens."""


class Distillation(BaseModel):
    """The settings of an emulator's distillation, and the losses before and after it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: NonNegativeInt
    batch_size: PositiveInt
    lr: float
    max_length: PositiveInt
    seed: int
    mse_weight: float
    public: dict[Hex32, str]
    """Files of public text: SHA-256 -> name."""
    full: Losses
    """Losses of the model with its real trunk."""
    before: Losses
    """Losses with the emulator before distillation."""
    after: Losses
    """Losses with the emulator as it is stored, rounding included."""


class Manifest(BaseModel):
    """The description of an emulator. `read_manifest` returns one after checking its signature."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = FORMAT
    model: str
    """The source model's name."""
    fingerprint: Hex32
    """Fingerprint of the source model's weights (`FrozenBackbone.fingerprint`)."""
    bottom: PositiveInt
    """Number of blocks in the bottom."""
    top: PositiveInt
    """Number of blocks in the top."""
    blocks: Annotated[list[NonNegativeInt], Field(min_length=1)]
    """Indices of the kept blocks in the whole model."""
    config: dict[str, Any]
    """The source model's configuration in transformers."""
    dtype: str
    """Dtype of the weights after loading."""
    int8: bool
    """Whether linear layers' weights are stored in int8, with a scale for each output channel."""
    parameters: PositiveInt
    """Number of weights."""
    distillation: Distillation | None = None
    weights_sha256: Hex32
    """SHA-256 of the file `emulator.safetensors`."""
    tensors_sha256: Hex32
    """SHA-256 over the stored tensors' names, dtypes, shapes and bytes (`tensors_sha256`), with which clients check
    the tensors that they receive."""
    public_key: Hex32
    """The raw Ed25519 key, in hexadecimal."""
    signature: Hex64

    def check_source(self, fingerprint: str, cut: Cut) -> None:
        """Raises `EmulatorError` if the emulator was made from other weights, or for another cut."""
        if self.fingerprint != fingerprint:
            raise EmulatorError(
                f"The emulator was made from other weights, of {self.model!r} with the fingerprint "
                f"{self.fingerprint[:12]}…; the hosted model has {fingerprint[:12]}….",
                remedy="Build one from the hosted model, in the dtype it is hosted in: `blindtune emulator build`.",
            )
        if (self.bottom, self.top) != (cut.bottom, cut.top):
            raise EmulatorError(
                f"The emulator was made for a bottom of {self.bottom} and a top of {self.top} blocks; the hosted model "
                f"is cut at {cut.bottom} and {cut.top}.",
                remedy=f"Serve with --cut {self.bottom},{self.top}, or build an emulator for this cut.",
            )

    def check_key(self, trusted_key: str) -> None:
        """Raises `EmulatorError` unless the emulator is signed with this key (hexadecimal)."""
        if self.public_key != trusted_key.strip().lower():
            raise EmulatorError(
                f"The emulator is signed with the unknown key {self.public_key}; {trusted_key.strip()} is trusted.",
                remedy="Ask the provider for its public key, over a channel that you trust.",
            )


def sign_manifest(fields: dict[str, Any], key: Ed25519PrivateKey) -> str:
    """Returns the manifest as JSON, with `public_key` and `signature` added to `fields`."""
    fields = {"format": FORMAT, **fields, "public_key": public_key(key)}
    return json.dumps({**fields, "signature": key.sign(_canonical(fields)).hex()}, indent=2) + "\n"


def read_manifest(text: str) -> Manifest:
    """Returns the manifest after checking its signature against the public key that it contains.

    The caller has to check that this key is the provider's (`Manifest.check_key`).

    Raises:
        EmulatorError: the text isn't a JSON object, has another format, an invalid signature, or invalid fields.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise _tampered("is no JSON object")
    fields = cast("dict[str, Any]", fields)
    if fields.get("format") != FORMAT:
        raise EmulatorError(
            f"The emulator's manifest has format {fields.get('format')!r}; this version reads {FORMAT}.",
            remedy="Use the version of blindtune that built it.",
        )
    rest = {name: value for name, value in fields.items() if name != "signature"}
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(fields["public_key"]))
        key.verify(bytes.fromhex(fields["signature"]), _canonical(rest))
    except (KeyError, TypeError, ValueError, RecursionError):
        raise _tampered("has no readable signature") from None
    except InvalidSignature:
        raise _tampered("doesn't fit its signature") from None
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise _tampered(f"has no valid {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def signing_key(path: Path) -> Ed25519PrivateKey:
    """Returns the Ed25519 private key (PEM, without password) in this file.

    If there is no file, generates a key and writes it to a file that only its owner can read.

    Raises:
        ConfigError: the file doesn't contain such a key.
    """
    if not path.exists():
        key = Ed25519PrivateKey.generate()
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), PRIVATE)
        return key
    try:
        private_key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} can't be read as a key: {error}.", remedy=_OTHER_KEY) from None
    if not isinstance(private_key, Ed25519PrivateKey):
        raise ConfigError(f"{path} holds a key of another kind, {type(private_key).__name__}.", remedy=_OTHER_KEY)
    return private_key


def public_key(key: Ed25519PrivateKey) -> str:
    """Returns the public key in 64 hexadecimal digits. Providers publish it for clients to trust."""
    return key.public_key().public_bytes_raw().hex()


_OTHER_KEY = "Give an Ed25519 private key in PEM without a password, or a path that doesn't exist yet, for a new key."


def _canonical(fields: dict[str, Any]) -> bytes:
    """Returns the canonical JSON that is signed."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _tampered(what: str) -> EmulatorError:
    """Returns the error for an invalid manifest; `what` continues "The emulator's manifest"."""
    return EmulatorError(
        f"The emulator's manifest {what}: it was damaged or tampered with.",
        remedy="Get the emulator from its provider again.",
    )
