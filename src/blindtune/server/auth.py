"""Creates and checks bearer tokens. A token file has a line `name sha256:<hex>` for each tenant, and no tokens.

A token has 256 random bits, so it can't be guessed from its hash, and no slow hash function is needed. Each tenant has
one token.
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
    """The tenants of a server.

    Args:
        hashes: name of a tenant -> SHA-256 of its token in hexadecimal. None: no token is required.
    """

    def __init__(self, hashes: dict[str, str] | None) -> None:
        self._hashes = hashes

    @staticmethod
    def open_to_all() -> TokenStore:
        """Returns a store that requires no token, and in which all requests belong to the tenant `anonymous`."""
        return TokenStore(None)

    @staticmethod
    def from_file(path: Path) -> TokenStore:
        """Reads a token file.

        Raises:
            ConfigError: the file is missing, or a line isn't `name sha256:<hex>`.
        """
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
        """Returns the tenant that an `Authorization` header belongs to. All hashes are compared in constant time.

        Raises:
            Unauthenticated: the header holds no bearer token, or an unknown one.
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
    """Returns the SHA-256 of a token in hexadecimal, as in the token file."""
    return hashlib.sha256(token.encode()).hexdigest()


def add_token(path: Path, name: str) -> str:
    """Generates a token for a new tenant, and appends the tenant to the file. A new file gets mode 600.

    Returns:
        The token. The file keeps only its hash, so it can't be shown again.
    Raises:
        ConfigError: the name already exists, is empty, begins with `#` or contains white space.
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
