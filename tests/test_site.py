"""The documentation: made from the code as it is, built without a warning, and without a link that leads nowhere."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SOURCES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


class Page(HTMLParser):
    """The anchors of a page, and what it links to or shows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = {""}
        self.targets: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if name := found.get("id"):
            self.anchors.add(name)
        for attribute in ("href", "src"):
            if target := found.get(attribute):
                self.targets.append(target)


def dead_links(folder: Path) -> Iterator[str]:
    """Every link or image of the HTML in a folder that leads nowhere within it."""
    pages = {path: Page(path) for path in folder.rglob("*.html")}
    for path, page in pages.items():
        for target in page.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            leads = (path.parent / unquote(url.path)).resolve() if url.path else path
            if leads.is_dir():
                leads /= "index.html"
            lost = leads in pages and unquote(url.fragment) not in pages[leads].anchors
            if not leads.is_file() or lost:
                yield f"{path.relative_to(folder)}: {target}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-n", "-q"]
    work = ["-d", str(folder / "doctrees"), str(DOCS), str(folder / "html")]
    built = subprocess.run([*command, *work], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder / "html"


def test_the_site_builds_and_every_link_and_image_in_it_leads_somewhere(site: Path):
    assert list(dead_links(site)) == []


def test_every_source_is_a_page_of_the_site_that_the_start_page_leads_to(site: Path):
    start = {unquote(urlsplit(target).path) for target in Page(site / "index.html").targets}
    expected = {str(page.relative_to(DOCS).with_suffix(".html")) for page in SOURCES}
    assert expected - {"index.html"} <= start


@pytest.mark.parametrize("wrong", ["nowhere.html", "b.html#nowhere", "#nowhere", "picture.svg"])
def test_a_link_that_leads_nowhere_is_found(tmp_path: Path, wrong: str):
    (tmp_path / "b.html").write_text('<h1 id="here">b</h1>')
    (tmp_path / "a.html").write_text(f'<a href="b.html#here"></a><a href="https://c.example"></a><img src="{wrong}">')
    assert list(dead_links(tmp_path)) == [f"a.html: {wrong}"]


@pytest.mark.parametrize("page", [ROOT / "README.md", *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_files_lead_somewhere_in_the_repository_too(page: Path):
    for target in re.findall(r"\]\(([^)#\s]+)", FENCED.sub("", page.read_text())):
        if not urlsplit(target).scheme:
            assert (page.parent / target).exists(), target


def test_the_reference_is_what_make_docs_writes(tmp_path: Path):
    code = f"import docs.build_reference as b; from pathlib import Path; b.FOLDER = Path({str(tmp_path)!r}); b.main()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    for page in tmp_path.iterdir():
        assert page.read_text() == (DOCS / "reference" / page.name).read_text(), f"run `make docs`: {page.name}"
