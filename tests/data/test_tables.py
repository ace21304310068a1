"""Data files: every format gives the same examples; every fault gets an error that names it and the remedy."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blindtune.data import Columns, Examples, load_examples, split_examples
from blindtune.errors import BadEncoding, BadLabels, ConfigError, DataError, EmptyRows, MissingColumn

ROWS = [
    {"note": 'the patient coughs, "a lot"', "more": "since\nMonday", "diagnosis": "flu"},
    {"note": "a broken leg", "more": "fell", "diagnosis": "fracture"},
    {"note": "fièvre", "more": "hot", "diagnosis": "flu"},
    {"note": "the arm hurts", "more": "fell off a horse", "diagnosis": "fracture"},
]
COLUMNS = Columns("note", "diagnosis")


def write(folder: Path, kind: str, rows: list[dict] | None = None) -> str:
    rows = ROWS if rows is None else rows
    path = folder / f"notes.{kind}"
    if kind.startswith(("csv", "tsv")):
        import csv
        import io

        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0].keys(), delimiter="\t" if kind.startswith("tsv") else ",")
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode()
    elif kind.startswith("json"):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
        return str(path)
    path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "csv.gz", "jsonl.gz"])
def test_every_format_gives_the_same_examples(tmp_path, kind):
    examples = load_examples(write(tmp_path, kind), COLUMNS)
    assert examples.texts == [row["note"] for row in ROWS]
    assert examples.classes == ["flu", "fracture"] or examples.classes == ["fracture", "flu"]
    assert [examples.classes[i] for i in examples.labels] == [row["diagnosis"] for row in ROWS]


def test_pairs_keep_both_texts(tmp_path):
    examples = load_examples(write(tmp_path, "csv"), Columns("note", "diagnosis", "more"))
    assert examples.texts[0] == (ROWS[0]["note"], ROWS[0]["more"])


def test_class_names_fix_the_order(tmp_path):
    examples = load_examples(write(tmp_path, "csv"), COLUMNS, classes=["fracture", "flu"])
    assert examples.labels == [1, 0, 1, 0]


def test_integer_labels_may_be_named(tmp_path):
    rows = [{"note": f"text {i}", "diagnosis": i % 2} for i in range(6)]
    examples = load_examples(write(tmp_path, "jsonl", rows), COLUMNS, classes=["negative", "positive"])
    assert examples.classes == ["negative", "positive"]
    assert examples.labels == [0, 1, 0, 1, 0, 1]


def test_integer_classes_are_sorted_by_value(tmp_path):
    rows = [{"note": f"text {i}", "diagnosis": i % 11} for i in range(44)]
    assert load_examples(write(tmp_path, "csv", rows), COLUMNS).classes[-2:] == ["9", "10"]


def test_csv_labels_mean_what_they_say(tmp_path):
    """No type is guessed: NA and 007 are names."""
    rows = [{"note": f"text {i}", "diagnosis": ["NA", "007"][i % 2]} for i in range(4)]
    assert load_examples(write(tmp_path, "csv", rows), COLUMNS).classes == ["007", "NA"]


def test_no_labels_are_needed_to_predict(tmp_path):
    assert load_examples(write(tmp_path, "csv"), Columns("note")).labels is None


def bad(folder: Path, diagnoses: list, kind: str = "jsonl") -> str:
    return write(folder, kind, [{"note": f"text {i}", "diagnosis": d} for i, d in enumerate(diagnoses)])


@pytest.mark.parametrize(
    ("diagnoses", "words"),
    [
        (["flu", None, "cold", "flu"], "1 rows without a label in 'diagnosis': row 2"),
        (["flu", "flu", "flu"], "All labels .* are 'flu'"),
        ([0.5, 1.5, 0.5, 2.5], "0.5, a number with a fraction"),
        (["a", "b", "c", "d", "e", "f"], "6 different labels in 6 rows"),
        ([["a"], ["b"], ["a"], ["b"]], r"holds \['a'\]"),
    ],
)
def test_labels_that_cannot_be_learned_are_refused(tmp_path, diagnoses, words):
    with pytest.raises(BadLabels, match=words):
        load_examples(bad(tmp_path, diagnoses), COLUMNS)


def test_labels_outside_the_classes_are_refused_with_their_names(tmp_path):
    with pytest.raises(BadLabels, match=r"outside the classes: fracture.*The classes are: flu, cold"):
        load_examples(write(tmp_path, "csv"), COLUMNS, classes=["flu", "cold"])


def test_a_missing_column_is_named_beside_those_that_exist(tmp_path):
    with pytest.raises(MissingColumn, match=r"no column 'diagnose'.*It has: note, more, diagnosis"):
        load_examples(write(tmp_path, "csv"), Columns("note", "diagnose"))


def test_broken_encoding_names_the_line(tmp_path):
    path = tmp_path / "notes.csv"
    path.write_bytes("note,diagnosis\nfine,flu\nfièvre,flu\n".encode("latin-1"))
    with pytest.raises(BadEncoding, match=r"Line 3 .* isn't UTF-8 .*0xe8.*iconv"):
        load_examples(str(path), COLUMNS)


def test_broken_rows_are_reported_by_the_reader(tmp_path):
    path = tmp_path / "notes.csv"
    path.write_text("note,diagnosis\nfine,flu\nthis,has,too,many\n")
    with pytest.raises(BadEncoding, match="can't be read as csv"):
        load_examples(str(path), COLUMNS)


def test_empty_rows_are_counted_and_named(tmp_path):
    rows = [{"note": "x", "diagnosis": "a"}, {"note": "  ", "diagnosis": "b"}, {"note": "", "diagnosis": "a"}]
    with pytest.raises(EmptyRows, match="2 rows without 'note': row 2, 3"):
        load_examples(write(tmp_path, "csv", rows), COLUMNS)


def test_a_file_without_rows_is_refused(tmp_path):
    path = tmp_path / "notes.csv"
    path.write_text("note,diagnosis\n")
    with pytest.raises(EmptyRows, match="no rows"):
        load_examples(str(path), COLUMNS)


def test_a_missing_file_is_an_error_about_the_path(tmp_path):
    with pytest.raises(DataError, match=r"no file .*nothing\.csv"):
        load_examples(str(tmp_path / "nothing.csv"), COLUMNS)


def test_numbers_are_no_texts(tmp_path):
    rows = [{"note": 3, "diagnosis": "a"}, {"note": 4, "diagnosis": "b"}]
    with pytest.raises(DataError, match="holds 3, not text"):
        load_examples(write(tmp_path, "jsonl", rows), COLUMNS)


def test_a_hub_data_set_is_read_through_the_hub_library(tmp_path):
    """A local folder in the hub's layout: what `load_dataset` reads without a network."""
    folder = tmp_path / "reviews"
    folder.mkdir()
    rows = [{"note": f"text {i}", "diagnosis": ["flu", "cold"][i % 2]} for i in range(6)]
    write(folder, "jsonl", rows)
    (folder / "notes.jsonl").rename(folder / "train.jsonl")
    examples = load_examples(str(folder), COLUMNS, split="train")
    assert len(examples) == 6
    assert set(examples.classes) == {"cold", "flu"}


def test_an_unknown_hub_data_set_is_an_error_about_names_and_network():
    with pytest.raises(DataError, match="hub data set 'no-such-owner/no-such-data'"):
        load_examples("no-such-owner/no-such-data", COLUMNS)


def test_a_split_is_disjoint_complete_and_repeatable(tmp_path):
    rows = [{"note": f"text {i}", "diagnosis": "ab"[i % 2]} for i in range(50)]
    examples = load_examples(write(tmp_path, "csv", rows), COLUMNS)
    train, held_out = split_examples(examples, 0.2, seed=3)
    assert len(held_out) == 10
    assert sorted([*train.texts, *held_out.texts]) == sorted(examples.texts)
    assert split_examples(examples, 0.2, seed=3)[1].texts == held_out.texts
    with pytest.raises(ConfigError, match="leaves 0 of 50"):
        split_examples(examples, 0.001, seed=3)


def test_a_hub_data_set_keeps_its_class_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub serves them: Parquet with features, here in a folder, which needs no network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["ill", "well"])}
    )
    rows = datasets.Dataset.from_dict({"sentence": ["fever", "rest", "pain"], "label": [0, 1, 0]}, features=features)
    (tmp_path / "set" / "data").mkdir(parents=True)
    rows.to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    examples = load_examples(str(tmp_path / "set"), Columns("sentence", "label"))
    assert examples == Examples(["fever", "rest", "pain"], [0, 1, 0], ["ill", "well"])
