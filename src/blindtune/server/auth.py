"""Bearer tokens. The file holds names and SHA-256 hashes, never a token: `name sha256:<hex>` on each line.

Tokens are 256 random bits, so a plain hash is as good as a slow one. Each token is a tenant of its own.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from blindtune.errors import ConfigError, Unauthenticated

_PREFIX = "sha256:"
ANONYMOUS = "anonymous"


class TokenStore:
    """Known tokens, or nobody asked for one (`TokenStore.open_to_all()`)."""

    def __init__(self, hashes: dict[str, str] | None) -> None:
        self._hashes = hashes

    @staticmethod
    def open_to_all() -> TokenStore:
        return TokenStore(None)

    @staticmethod
    def from_file(path: Path) -> TokenStore:
        """Raises `ConfigError` for a missing file or a line that isn't `name sha256:<hex>`."""
        if not path.is_file():
            raise ConfigError(
                f"There is no token file {path}.", remedy="Make one: blindtune token NAME --token-file FILE"
            )
        hashes: dict[str, str] = {}
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            name, _, value = line.partition(" ")
            digest = value.strip().removeprefix(_PREFIX)
            if not re.fullmatch(_PREFIX + "[0-9a-f]{64}", value.strip()):
                raise ConfigError(
                    f"Line {number} of {path} is not `name {_PREFIX}<hex>`.",
                    remedy="Make tokens with `blindtune token`.",
                )
            hashes[name] = digest
        return TokenStore(hashes)

    def tenant(self, authorization: str | None) -> str:
        """The tenant of an `Authorization` header. All entries are compared, each in constant time.

        Raises:
            Unauthenticated: no bearer token, or an unknown one.
        """
        if self._hashes is None:
            return ANONYMOUS
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("The request carries no bearer token.", remedy="Pass the provider's token (--token).")
        digest = hash_token(token.strip())
        found = [name for name, known in self._hashes.items() if hmac.compare_digest(known, digest)]
        if not found:
            raise Unauthenticated("The token is not known here.", remedy="Ask the provider for a valid token.")
        return found[0]


def hash_token(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def add_token(path: Path, name: str) -> str:
    """Appends a new tenant to the file (mode 600) and returns the token, which is shown only this once.

    Raises:
        ConfigError: the name is taken, empty or has blanks.
    """
    if not name or name.split() != [name] or name.startswith("#"):
        raise ConfigError(f"{name!r} is no tenant name.", remedy="Use a word without blanks.")
    known = path.read_text() if path.exists() else ""
    if any(line.split(" ")[0] == name for line in known.splitlines()):
        raise ConfigError(
            f"{path} already has a tenant {name!r}.", remedy="Remove that line first, or take another name."
        )
    token = "bt_" + secrets.token_urlsafe(32)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "a") as file:
        file.write("\n" if known and not known.endswith("\n") else "")
        file.write(f"{name} {_PREFIX}{hash_token(token)}\n")
    return token
