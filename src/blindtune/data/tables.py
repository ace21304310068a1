"""Reads and checks labelled texts from CSV, TSV, JSON lines or Parquet files, or from a hub data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from blindtune.errors import BadEncoding, BadLabels, ConfigError, DataError, EmptyRows, MissingColumn

Text = str | tuple[str, str]
Table = Any
"""A `pyarrow.Table`; pyarrow has no type annotations."""
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_MOST_CLASSES = 1000
_SHOWN = 5


@dataclass(frozen=True)
class Columns:
    """The names of a table's columns. `text_pair` is for tasks on two texts; `label` is None for prediction."""

    text: str
    label: str | None = None
    text_pair: str | None = None


@dataclass(frozen=True)
class Examples:
    """Texts, or pairs of texts, with their class indices into `classes`; labels are None for prediction."""

    texts: list[Text]
    labels: list[int] | None
    classes: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Examples:
        """Returns the examples with these indices."""
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        return Examples([self.texts[i] for i in indices], labels, self.classes)


def load_examples(
    source: str, columns: Columns, *, classes: Sequence[str] | None = None, split: str = "train"
) -> Examples:
    """Reads a file (`.csv`, `.tsv`, `.jsonl`, `.json`, `.parquet`, the text ones also `.gz`) or a hub data set.

    Args:
        source: a path, or a hub name such as `glue/sst2` or `glue/sst2:validation` (with the extra `hub` and a
            network).
        classes: class names in the order of their indices. Default: the sorted labels in the data.
        split: split of a hub data set whose name has none.
    Raises:
        DataError: the data can't be used. The message names the rows and a remedy.
    """
    return examples_of(read_table(source, split), source, columns, classes)


def examples_of(table: Table, source: str, columns: Columns, classes: Sequence[str] | None = None) -> Examples:
    """Returns the examples in a table from `read_table`; see `load_examples`."""
    texts = _texts(table, source, columns)
    if columns.label is None:
        return Examples(texts, None, list(classes or []))
    labels, names = _labels(read_column(table, source, columns.label), source, columns.label, classes)
    return Examples(texts, labels, names)


def read_table(source: str, split: str) -> Table:
    """Returns all rows of a file or a hub data set in the formats of `load_examples`. Raises `DataError`."""
    path = Path(source).expanduser()
    if path.is_file() or _kind(path):
        table = _read_file(path)
    else:
        name, _, chosen = source.partition(":")
        table = _read_hub(name, chosen or split)
    if table.num_rows == 0:
        raise EmptyRows(f"{source} has no rows.", remedy="Give a file with examples.")
    return table


def split_examples(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Splits examples at random into fractions (1 − fraction, fraction). Both parts have all class names.

    Raises:
        ConfigError: one part would be empty.
    """
    count = round(len(examples) * fraction)
    if not 0 < count < len(examples):
        raise ConfigError(
            f"A validation fraction of {fraction} leaves {count} of {len(examples)} examples.",
            remedy="Choose a fraction between 0 and 1 that leaves examples on both sides.",
        )
    kept, held_out = split_indices(len(examples), count, seed)
    return examples.take(kept), examples.take(held_out)


def split_indices(examples: int, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Returns the sorted indices of the examples to keep, and of `held_out` random examples to hold out.

    Raises:
        ConfigError: no example would be kept.
    """
    if held_out >= examples:
        raise ConfigError(
            f"All {examples} examples would be held out for validation.", remedy="Choose a smaller fraction."
        )
    order = np.random.default_rng(seed).permutation(examples).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def _kind(path: Path) -> str:
    """Returns the suffix that names a file's format, without `.gz`; empty for a format that isn't supported."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    return last if last in (*_DELIMITERS, ".jsonl", ".json", ".ndjson", ".parquet") else ""


def _read_file(path: Path) -> Table:
    """Returns all rows of a file. Raises `DataError`."""
    if not path.is_file():
        raise DataError(f"There is no file {path}.", remedy="Check the path.")
    kind = _kind(path)
    if not kind:
        raise DataError(
            f"{path} has no known format.", remedy="Use .csv, .tsv, .jsonl or .parquet (text files also with .gz)."
        )
    try:
        if kind == ".parquet":
            return pyarrow.parquet.read_table(path)
        with pa.input_stream(str(path), compression="detect") as stream:
            content = stream.read()
        try:
            content.decode()
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise BadEncoding(
                f"Line {line} of {path} isn't UTF-8 (byte {error.start}: 0x{content[error.start]:02x}).",
                remedy="Convert the file: iconv -f LATIN1 -t UTF-8.",
            ) from None
        if kind in _DELIMITERS:
            return _read_delimited(content, _DELIMITERS[kind])
        return pyarrow.json.read_json(pa.BufferReader(content))
    except pa.ArrowException as error:
        raise BadEncoding(
            f"{path} can't be read as {kind[1:]}: {str(error).splitlines()[0]}", remedy="Repair the rows that it names."
        ) from None


def _read_delimited(content: bytes, delimiter: str) -> Table:
    """Reads all columns as text, so that labels such as 007 or NA aren't converted to numbers or missing values."""
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    names = pyarrow.csv.open_csv(pa.BufferReader(content), parse_options=parse).schema.names
    convert = pyarrow.csv.ConvertOptions(
        column_types={name: pa.string() for name in names}, strings_can_be_null=False, null_values=[]
    )
    return pyarrow.csv.read_csv(pa.BufferReader(content), parse_options=parse, convert_options=convert)


def _read_hub(name: str, split: str) -> Table:
    """Returns all rows of a split of a hub data set, with class names as labels. Raises `DataError`."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(
            f"{name!r} is no file, and hub data sets need the extra `hub`.",
            remedy="Check the path, or run: pip install 'blindtune[hub]'",
        ) from None
    attempts: list[tuple[str, str | None]] = [(name, None)]
    if "/" in name:  # `glue/sst2`, `nyu-mll/glue/sst2`: the last part may be a configuration
        path, config = name.rsplit("/", 1)
        attempts.append((path, config))
    loaded: Any = None
    failure: Exception | None = None
    for path, config in attempts[::-1] if name.count("/") > 1 else attempts:
        try:
            loaded = datasets.load_dataset(path, config, split=split)
            break
        except Exception as error:  # the library raises many kinds of errors
            failure = error
    if loaded is None:
        raise DataError(
            f"The hub data set {name!r} (split {split!r}) can't be loaded: {str(failure).splitlines()[0]}",
            remedy="Check its name, its splits and your network.",
        ) from failure
    table: Table = loaded.with_format("arrow")[:]
    for column, feature in loaded.features.items():
        if isinstance(feature, datasets.ClassLabel):  # replaces class indices by class names
            named = [None if v is None or v < 0 else feature.names[v] for v in table[column].to_pylist()]
            table = table.set_column(table.schema.get_field_index(column), column, pa.array(named, pa.string()))
    return table


def read_column(table: Table, source: str, name: str) -> list[Any]:
    """Returns the values of a column. Raises `MissingColumn`."""
    if name not in table.column_names:
        raise MissingColumn(f"{source} has no column {name!r}.", remedy=f"It has: {', '.join(table.column_names)}.")
    return cast("list[Any]", table[name].to_pylist())


def _texts(table: Table, source: str, columns: Columns) -> list[Text]:
    """Returns the texts, or pairs of texts, of all rows."""
    firsts = _strings(table, source, columns.text)
    if columns.text_pair is None:
        return list(firsts)
    return list(zip(firsts, _strings(table, source, columns.text_pair), strict=True))


def _strings(table: Table, source: str, name: str) -> list[str]:
    """Returns a column of texts. Raises `EmptyRows`, or `DataError` for values that aren't text."""
    values = read_column(table, source, name)
    empty = [row for row, value in enumerate(values, 1) if value is None or not str(value).strip()]
    if empty:
        raise EmptyRows(
            f"{source} has {len(empty)} rows without {name!r}: row {some_of(empty)}.", remedy="Fill or remove them."
        )
    if not all(isinstance(value, str) for value in values):
        odd = next(value for value in values if not isinstance(value, str))
        raise DataError(f"The column {name!r} of {source} holds {odd!r}, not text.", remedy="Name the column of texts.")
    return values


def _labels(values: list[Any], source: str, column: str, classes: Sequence[str] | None) -> tuple[list[int], list[str]]:
    """Returns class indices and class names. Raises `BadLabels`.

    Integers, booleans and texts are accepted as class names, numbers with a fraction aren't.
    """
    missing = [row for row, value in enumerate(values, 1) if value is None or not str(value).strip()]
    if missing:
        raise BadLabels(
            f"{source} has {len(missing)} rows without a label in {column!r}: row {some_of(missing)}.",
            remedy="Fill or remove them.",
        )
    names = [_class_name(value, source, column) for value in values]
    distinct = sorted(set(names), key=_natural)
    if len(distinct) < 2 and not classes:
        raise BadLabels(
            f"All labels in {column!r} of {source} are {distinct[0]!r}.", remedy="A task needs at least two classes."
        )
    if not classes and len(distinct) > min(_MOST_CLASSES, max(2, len(values) // 2)):
        raise BadLabels(
            f"{column!r} of {source} has {len(distinct)} different labels in {len(values)} rows, e.g. "
            f"{distinct[0][:40]!r}.",
            remedy="Name a column of classes, not of texts or numbers.",
        )
    class_names = list(classes or distinct)
    none_named = not set(distinct) & set(class_names)
    if none_named and all(name.isdigit() and int(name) < len(class_names) for name in distinct):
        return [int(name) for name in names], class_names  # the labels are indices into the given class names
    unknown = sorted(set(distinct) - set(class_names))
    if unknown:
        raise BadLabels(
            f"{column!r} of {source} has labels outside the classes: {some_of(unknown)}.",
            remedy=f"The classes are: {', '.join(class_names)}.",
        )
    index = {name: position for position, name in enumerate(class_names)}
    return [index[name] for name in names], class_names


def _class_name(value: Any, source: str, column: str) -> str:
    """Returns a label as a class name. Raises `BadLabels`."""
    if isinstance(value, float):
        if not value.is_integer():
            raise BadLabels(
                f"{column!r} of {source} holds {value!r}, a number with a fraction.",
                remedy="Only classes can be learned: bin the numbers first.",
            )
        value = int(value)
    if not isinstance(value, (str, int)):
        raise BadLabels(f"{column!r} of {source} holds {value!r}.", remedy="Labels are texts, integers or booleans.")
    return str(value).strip()


def _natural(name: str) -> tuple[bool, int, str]:
    """Returns a sort key: integers by value, before all other names."""
    return (not name.isdigit(), int(name) if name.isdigit() else 0, name)


def some_of(values: Sequence[object]) -> str:
    """Returns the first few values as a text, for an error message."""
    shown = ", ".join(str(value) for value in values[:_SHOWN])
    return shown + (", …" if len(values) > _SHOWN else "")
