"""`blindtune emulator build` as a provider runs it, and the public text that it reads."""

from __future__ import annotations

import gzip
import json
import re
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blindtune.cli import app
from blindtune.client import Operator, Transport, fetch_emulator
from blindtune.data.public_text import PublicText, passages, read_lines
from blindtune.errors import BadEncoding, DataError
from blindtune.models import Tokenizer
from blindtune.models.cut.emulator import load_emulator
from blindtune.models.cut.manifest import public_key, signing_key
from tests.processes import run
from tests.tiny import PAD, build_tokenizer
from tests.tiny_causal import save_tiny_causal


@pytest.fixture(scope="module")
def model(tmp_path_factory, film_sentences) -> Path:
    return save_tiny_causal("llama", tmp_path_factory.mktemp("model") / "tiny", film_sentences[:400], layers=8)


@pytest.fixture(scope="module")
def public(tmp_path_factory, film_sentences) -> list[Path]:
    """Plain lines, and compressed JSON lines."""
    folder = tmp_path_factory.mktemp("public")
    (folder / "plain.txt").write_text("\n".join(film_sentences[:150]))
    rows = [json.dumps({"text": text, "id": index}) for index, text in enumerate(film_sentences[150:400])]
    (folder / "records.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    return [folder / "plain.txt", folder / "records.jsonl.gz"]


@pytest.fixture(scope="module")
def built(model, public, tmp_path_factory) -> tuple[Path, Path, str]:
    """The folder, the key's file, and what was printed."""
    folder = tmp_path_factory.mktemp("built")
    options = {"model": model, "cut": 2, "keep": 2, "key": folder / "provider.pem", "output": folder / "emulator"}
    options |= {"steps": 40, "batch-size": 4, "lr": 0.003, "max-length": 24, "threads": 1, "json": folder / "out.json"}
    switches = ["--int8", *(f"--public={path}" for path in public)]
    done = run("emulator", "build", *switches, *(f"--{name}={value}" for name, value in options.items()))
    return folder / "emulator", folder / "provider.pem", done.stdout


def test_build_prints_what_it_kept_and_what_it_cost(built):
    folder, key, printed = built
    stored = load_emulator(folder)
    manifest = stored.manifest
    distillation = manifest.distillation
    assert manifest.blocks == [2, 5]
    assert distillation is not None
    rows = {
        match[1].strip(): match[2].strip() for match in re.finditer(r"^│ (.+?) +│ +(.+?) +│$", printed, re.MULTILINE)
    }
    assert rows["kept blocks"] == "2, 5 (2 of 4)"
    assert rows["parameters"] == f"{manifest.parameters:,} of {2 * manifest.parameters:,} (50%)"
    assert rows["weights"].endswith("kB, int8")
    assert rows["LM loss of the full model"] == f"{distillation.full.lm_loss:.3f}"
    assert rows["LM loss with the emulator, before distillation"] == f"{distillation.before.lm_loss:.3f}"
    assert rows["LM loss with the emulator, after, as it is stored"] == f"{distillation.after.lm_loss:.3f}"
    assert rows["error at its output, before"] == f"{distillation.before.mse:.4f}"
    assert rows["error at its output, after, as it is stored"] == f"{distillation.after.mse:.4f}"
    assert distillation.after.mse < distillation.before.mse
    assert "distilling" in printed
    assert public_key(signing_key(key)) in printed


def test_the_manifest_says_how_it_was_made(built, public):
    folder, key, _ = built
    manifest = load_emulator(folder).manifest
    distillation = manifest.distillation
    assert distillation is not None
    assert (distillation.steps, distillation.batch_size, distillation.lr) == (40, 4, 0.003)
    assert sorted(distillation.public.values()) == [path.name for path in public]
    assert manifest.public_key == public_key(signing_key(key))
    assert json.loads((folder.parent / "out.json").read_text()) == manifest.model_dump()


def test_the_key_that_was_made_is_for_its_owner_only(built):
    assert stat.S_IMODE(built[1].stat().st_mode) == 0o600


def test_a_server_offers_what_was_built(built, model, start_server):
    folder, key, _ = built
    with start_server(model, cut=2, emulator=folder) as server:
        part, manifest = fetch_emulator(Operator(Transport(server.url), None), public_key(signing_key(key)))
    assert list(part.blocks) == manifest.blocks == [2, 5]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keep": 5}, "An emulator of 5 layers, of a trunk of 4"),
        ({"cut": "4"}, "every part needs a block"),
        ({"cut": "x"}, "--cut x can't be read"),
        ({"public": "nowhere.txt"}, "There is no file nowhere.txt"),
        ({"max-length": 90}, "the model takes 64.*--max-length"),
        ({"lr": 1e30}, "Lower --lr"),
    ],
)
def test_what_cannot_work_is_said(model, public, tmp_path, change, words):
    options = {"model": model, "cut": 2, "keep": 2, "public": public[0], "key": tmp_path / "key.pem"}
    options |= {"output": tmp_path / "out", "steps": 9, "max-length": 24, **change}
    result = CliRunner().invoke(app, ["emulator", "build", *(f"--{name}={value}" for name, value in options.items())])
    assert result.exit_code == 1
    assert re.search(words, result.output.replace("\n", " "))
    assert not (tmp_path / "out").exists()


# Public text.


@pytest.fixture(scope="module")
def tokenizer(film_sentences) -> Tokenizer:
    backend = build_tokenizer(film_sentences[:400], start=True, end=False).backend_tokenizer
    return Tokenizer(backend.to_str(), pad_token_id=PAD, with_types=False)


def test_lines_are_the_same_from_every_format(tmp_path):
    lines = ["A first line.", "A second one."]
    (tmp_path / "a.txt").write_text("A first line.\n\n  A second one.  \n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress((tmp_path / "a.txt").read_bytes()))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "\n".join(lines)}) + "\n")
    (tmp_path / "a.csv").write_text("text\n" + "\n".join(lines) + "\n")
    assert all(read_lines(path) == lines for path in tmp_path.iterdir())


def test_files_that_hold_no_text_are_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Straße".encode("latin-1"))
    (tmp_path / "broken.txt.gz").write_bytes(b"no gzip")
    for name in ("latin.txt", "broken.txt.gz"):
        with pytest.raises(BadEncoding, match=name):
            read_lines(tmp_path / name)
    (tmp_path / "no-text.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match="no column 'text'"):
        read_lines(tmp_path / "no-text.jsonl")


def test_passages_hold_whole_lines_in_order_up_to_the_limit(tokenizer, film_sentences):
    lines = film_sentences[:60]
    rows = passages(lines, tokenizer, 40)
    alone = [row.ids[1:] for row in tokenizer.rows(lines, max_length=40)]  # without the token at the start
    assert max(len(row) for row in rows) <= 40
    assert len(rows) < len(lines)
    joined = [token for row in rows for token in row.ids[1:]]
    assert [token for ids in alone for token in ids if len(ids) < 38][:50] == joined[:50]


def test_held_out_passages_are_not_distilled_on(tokenizer, public):
    text = PublicText.read(public, tokenizer, max_length=24, batch_size=4, seed=3)
    held_out = {row.ids for row in text.held_out}
    assert len(text.held_out) == (len(text.held_out) + len(text.training)) // 10
    assert not held_out & {row.ids for row in text.training}
    batches = text.batches()
    seen = [next(batches) for _ in range(2 * -(-len(text.training) // 4))]  # two epochs
    rows = [tuple(ids[:n].tolist()) for t in seen for ids, n in zip(t.input_ids, t.lengths, strict=True)]
    assert sorted(rows) == sorted(2 * [row.ids for row in text.training])
    again = PublicText.read(public, tokenizer, max_length=24, batch_size=4, seed=3)
    assert [row.ids for row in again.held_out] == [row.ids for row in text.held_out]


def test_too_little_text_is_refused(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("one line")
    with pytest.raises(DataError, match="makes 1 passages"):
        PublicText.read([tmp_path / "a.txt"], tokenizer, max_length=24, batch_size=4, seed=0)
