"""Checks optional dependencies: if a package is missing, an exception names the extra to install."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from blindtune.errors import MissingExtra


@contextmanager
def requires(extra: str, what: str) -> Generator[None]:
    """Context manager around imports of packages that belong to an optional extra.

    Args:
        extra: name of the extra, as in `pip install 'blindtune[extra]'`.
        what: the feature that needs the packages, as the subject of the error's sentence.
    Raises:
        MissingExtra: a package isn't installed. It replaces the `ModuleNotFoundError` of the import.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "blindtune":
            raise
        raise MissingExtra(
            f"{what} needs the package {error.name.split('.')[0]!r}, which isn't installed.",
            remedy=f"pip install 'blindtune[{extra}]'",
        ) from error
