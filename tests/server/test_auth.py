"""Tokens: shown once, kept as hashes, compared in full."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from blindtune.errors import ConfigError, Unauthenticated
from blindtune.server import TokenStore, add_token


def test_the_file_holds_hashes_for_its_owner_alone_and_never_a_token(tmp_path: Path):
    path = tmp_path / "tokens"
    tokens = {name: add_token(path, name) for name in ("ann", "bob")}
    text = path.read_text()
    assert [line.split()[0] for line in text.splitlines()] == ["ann", "bob"]
    for token in tokens.values():
        assert token not in text
        assert token.removeprefix("bt_") not in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_each_token_belongs_to_its_tenant(tmp_path: Path):
    path = tmp_path / "tokens"
    ann, bob = add_token(path, "ann"), add_token(path, "bob")
    store = TokenStore.from_file(path)
    assert ann != bob
    assert store.tenant(f"Bearer {ann}") == "ann"
    assert store.tenant(f"bearer  {bob} ") == "bob"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic {token}", "{token}", "Token {token}"])
def test_a_request_without_a_bearer_token_is_refused(header: str | None, tmp_path: Path):
    token = add_token(tmp_path / "tokens", "ann")
    with pytest.raises(Unauthenticated, match="no bearer token") as caught:
        TokenStore.from_file(tmp_path / "tokens").tenant(header and header.format(token=token))
    assert "--token" in caught.value.remedy


def test_an_unknown_token_is_refused_and_not_repeated(tmp_path: Path):
    token = add_token(tmp_path / "tokens", "ann")
    store = TokenStore.from_file(tmp_path / "tokens")
    for wrong in (token[:-1], token + "x", token.upper(), "bt_", "ann", "x" * 10_000, "tökén"):
        with pytest.raises(Unauthenticated, match="not known") as caught:
            store.tenant(f"Bearer {wrong}")
        assert len(wrong) < 4 or wrong not in str(caught.value)


def test_the_hash_itself_is_no_token(tmp_path: Path):
    add_token(tmp_path / "tokens", "ann")
    line = (tmp_path / "tokens").read_text().split()[1]
    store = TokenStore.from_file(tmp_path / "tokens")
    for wrong in (line, line.removeprefix("sha256:")):
        with pytest.raises(Unauthenticated):
            store.tenant(f"Bearer {wrong}")


def test_a_store_that_is_open_to_all_asks_nobody():
    assert TokenStore.open_to_all().tenant(None) == "anonymous"


def test_a_file_without_tenants_lets_nobody_in(tmp_path: Path):
    path = tmp_path / "tokens"
    path.write_text("# nobody yet\n\n")
    with pytest.raises(Unauthenticated):
        TokenStore.from_file(path).tenant("Bearer bt_x")


@pytest.mark.parametrize("name", ["", "two words", "#ann", "a\nb", " ann", "a\tb"])
def test_a_name_that_would_break_the_file_is_refused(name: str, tmp_path: Path):
    with pytest.raises(ConfigError):
        add_token(tmp_path / "tokens", name)
    assert not (tmp_path / "tokens").exists()


def test_a_name_is_given_once(tmp_path: Path):
    first = add_token(tmp_path / "tokens", "ann")
    with pytest.raises(ConfigError, match="'ann'"):
        add_token(tmp_path / "tokens", "ann")
    assert TokenStore.from_file(tmp_path / "tokens").tenant(f"Bearer {first}") == "ann"


def test_a_file_that_an_editor_left_without_a_last_line_end_is_continued(tmp_path: Path):
    path = tmp_path / "tokens"
    ann = add_token(path, "ann")
    path.write_text(path.read_text().rstrip("\n"))
    bob = add_token(path, "bob")
    store = TokenStore.from_file(path)
    assert [store.tenant(f"Bearer {token}") for token in (ann, bob)] == ["ann", "bob"]


@pytest.mark.parametrize(
    "line", ["ann", "ann secret", "ann sha256:12ab", "ann md5:" + "a" * 64, "ann sha256:" + "g" * 64]
)
def test_a_line_of_another_form_is_refused_by_number(line: str, tmp_path: Path):
    path = tmp_path / "tokens"
    path.write_text(f"# comment\n{line}\n")
    with pytest.raises(ConfigError, match="Line 2"):
        TokenStore.from_file(path)


def test_a_missing_file_is_refused_with_how_to_make_one(tmp_path: Path):
    with pytest.raises(ConfigError, match="no-tokens") as caught:
        TokenStore.from_file(tmp_path / "no-tokens")
    assert "blindtune token" in caught.value.remedy


def test_the_command_prints_the_token_once_and_adds_its_hash(tmp_path: Path):
    path = tmp_path / "tokens"
    command = [sys.executable, "-m", "blindtune", "token", "ann", "--token-file", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    token = result.stdout.strip()
    assert TokenStore.from_file(path).tenant(f"Bearer {token}") == "ann"
    assert token not in path.read_text()
    assert token not in result.stderr
