"""Reads rows of tables in several formats: JSONL, Parquet, the ``datasets`` library, TFDS.

The libraries of the extra ``data`` are imported only by the readers that use them.
"""

import contextlib
import functools
import importlib
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from oapl_jax.config.names import nearest
from oapl_jax.untrusted import parquet, reading

NEAR = 0.4
"""How similar a name must be to be suggested: file names of one data set differ little."""


Choose = Callable[[str, Sequence[str]], list[str]]
"""From the name of a file and its columns to the whole columns that are read; raises a ValueError if one is missing."""
Records = Iterable[tuple[str, Iterable[Any]]]
"""The records of each file or split, with its name; a file is read when its turn comes."""


class Table(NamedTuple):
    """The wanted columns of a source."""

    name: str
    """Prefix of the names of its rows: row 17 is ``NAME/17``."""
    rows: list[tuple[Any, ...]]
    """Cells, in the order of the requested columns."""


def read(
    path: str,
    file_format: str,
    columns: Sequence[str],
    *,
    name: str | None = None,
    split: str = "train",
    optional: Sequence[str] = (),
    files: Sequence[str] = (),
) -> Table:
    """Reads the ``columns`` of all rows in the order of the source, followed by the ``optional`` ones.

    Args:
        path: file, folder, or name of a dataset.
        file_format: ``jsonl``, ``parquet``, ``datasets`` or ``tfds``.
        columns: names of the wanted columns; ``a.b`` is entry ``b`` of the object in column ``a``.
        name: configuration of the dataset, only for ``datasets``.
        split: split of the dataset, only for ``datasets`` and ``tfds``.
        optional: names of columns that may be missing, which makes their cells None.
        files: JSON files to read instead of ``path``, only for ``datasets``.

    Raises:
        ValueError: a file or column is missing, a row is broken, or there are no rows. The message has the most similar
            name that exists.
    """

    def choose(where: str, names: Sequence[str]) -> list[str]:
        heads = {column: column if column in names else column.partition(".")[0] for column in (*columns, *optional)}
        for column in columns:
            if heads[column] not in names:
                raise ValueError(f"{where}: has no column {heads[column]!r}; {_known(heads[column], names)}")
        return [head for head in dict.fromkeys(heads.values()) if head in names]

    if file_format == "jsonl":
        table_name, found = _read_json(_existing(path))
    elif file_format == "parquet":
        table_name, found = _read_parquet(_existing(path), choose)
    elif file_format == "datasets":
        table_name, found = _read_datasets(path, choose, name, split, files)
    else:
        table_name, found = _read_tfds(path, choose, split)
    rows = []
    for source, records in found:
        for i, record in enumerate(records):
            where = f"{source} row {i}"
            if not isinstance(record, Mapping):
                raise ValueError(f"{where}: is {type(record).__name__}, not an object")
            needed = [_cell(where, record, column, is_needed=True) for column in columns]
            rows.append((*needed, *(_cell(where, record, column, is_needed=False) for column in optional)))
    if not rows:
        raise ValueError(f"{path!r}: has no rows")
    return Table(table_name, rows)


def string_cell(value: Any, column: str, row_name: str) -> str:
    """The cell as text. Numbers become their digits, 72.0 those of 72; other types are errors."""
    value = plain_cell(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(
            f"row {row_name}: column {column!r} is {value!r:.80} ({type(value).__name__}), not a string or a number"
        )
    try:
        return value.encode().decode()
    except UnicodeError as error:
        raise ValueError(f"row {row_name}: column {column!r} has what is no Unicode text ({error})") from None


def answer_cell(value: Any, column: str, row_name: str) -> str:
    """The cell of a gold answer as text: objects and lists of objects, such as the tests of a program, become JSON."""
    value = plain_cell(value)
    parts = value if isinstance(value, list) and value else [value]
    return json.dumps(value) if all(isinstance(part, dict) for part in parts) else string_cell(value, column, row_name)


def plain_cell(value: Any) -> Any:
    """The cell as JSON knows it: bytes and NumPy's values of TFDS, and dates and decimals of Parquet, are converted."""
    if isinstance(value, Mapping):
        return {str(key): plain_cell(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_cell(entry) for entry in value]
    if isinstance(value, np.generic | np.ndarray):
        return plain_cell(value.tolist())
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")  # what is no Unicode text is an error where it is used
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _read_json(path: pathlib.Path) -> tuple[str, Records]:
    """Reads a file with one JSON object per line, or with one array of objects; ``.gz`` is unpacked."""
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; the format 'jsonl' needs a file")
    text = reading.read_text(path)
    if text.startswith("PAR1"):
        raise ValueError(f"{path}: is a Parquet file; set data.format=parquet")
    if text.lstrip().startswith("["):
        records = reading.parse_json(text, path)
    else:  # splitlines() would also split at characters such as U+2028, which JSON strings may contain
        lines = enumerate(text.split("\n"), start=1)
        records = [reading.parse_json(line, f"{path} line {number}") for number, line in lines if line.strip()]
    return path.name.removesuffix(".gz").rpartition(".")[0] or path.name, [(str(path), records)]


def _read_parquet(path: pathlib.Path, choose: Choose) -> tuple[str, Records]:
    """Reads a file, or all ``*.parquet`` files of a folder in the order of their names."""
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{str(path)!r}: the folder contains no *.parquet file")

    def records(file: pathlib.Path) -> list[dict[str, Any]]:
        return parquet.read(file, file, functools.partial(choose, str(file))).to_pylist()

    return path.stem, ((str(file), records(file)) for file in files)


def _cell(where: str, record: Any, column: str, *, is_needed: bool) -> Any:
    """A cell of a row; a column named ``a.b`` comes before entry ``b`` of column ``a``, an object or its JSON text."""
    for part in [column] if column in record else column.split("."):
        if isinstance(record, str):
            with contextlib.suppress(ValueError):
                record = reading.parse_json(record, where)
        if not isinstance(record, Mapping) or part not in record:
            known = _known(part, record if isinstance(record, Mapping) else ())
            if is_needed:
                raise ValueError(f"{where}: has no column {column!r}; {known}")
            return None
        record = record[part]
    return record


def _read_datasets(
    path: str, choose: Choose, name: str | None, split: str, files: Sequence[str]
) -> tuple[str, Records]:
    """Reads a folder written by ``save_to_disk``, or what ``load_dataset`` accepts: a hub name or a folder of files."""
    datasets = _library("datasets")
    if _looks_local(path):
        _existing(path)
    try:
        if pathlib.Path(path, "dataset_dict.json").is_file() or pathlib.Path(path, "state.json").is_file():
            loaded = datasets.load_from_disk(path)
        elif files:
            loaded = datasets.load_dataset("json", data_files=list(files), split=split)
        else:
            loaded = datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError) as error:  # the library's errors about names, splits and the network
        raise ValueError(f"{path!r}: the datasets library cannot load it: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"{path!r}: has no split {split!r}; {_known(split, loaded)}")
        loaded = loaded[split]
    where = f"{path!r} split {split!r}"
    if not isinstance(loaded, datasets.Dataset):
        raise ValueError(f"{where}: is a {type(loaded).__name__}, not a table")
    records = loaded.select_columns(choose(where, loaded.column_names)).to_list()
    return f"{pathlib.PurePath(path).name}/{split}", [(where, records)]


def _read_tfds(path: str, choose: Choose, split: str) -> tuple[str, Records]:
    """Reads a prepared dataset (array_record) by folder or name; ``as_data_source`` does without TensorFlow."""
    tfds = _library("tensorflow_datasets")
    if _looks_local(path) or pathlib.Path(path).is_dir():
        builder = tfds.builder_from_directory(_tfds_folder(_existing(path)))
    else:
        try:
            builder = tfds.builder(path, file_format="array_record")
            builder.download_and_prepare()
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"{path!r}: TFDS cannot load it: {error}") from error
    if split.partition("[")[0] not in builder.info.splits:  # a split can be a slice such as train[:100]
        raise ValueError(f"{path!r}: has no split {split!r}; {_known(split, builder.info.splits)}")
    where = f"{path!r} split {split!r}"
    choose(where, list(builder.info.features or {}))
    return f"{builder.name}/{split}", [(where, builder.as_data_source(split=split))]


def _library(module: str) -> Any:
    """A module of the extra ``data``, imported when it is first used."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f'{error.name} is not installed; run: pip install "oapl-jax[data]"') from error


def _tfds_folder(folder: pathlib.Path) -> pathlib.Path:
    """The only prepared dataset, a folder with dataset_info.json, in or below ``folder``."""
    found = [info.parent for info in sorted(folder.rglob("dataset_info.json"))]
    if len(found) != 1:
        below = f"; choose one of {', '.join(map(str, found))}" if found else ""
        raise ValueError(f"{str(folder)!r} contains {len(found)} prepared TFDS datasets, but should contain one{below}")
    return found[0]


def _looks_local(path: str) -> bool:
    return path.startswith(("/", "./", "../", "~")) or path.count("/") > 1


def _existing(path: str) -> pathlib.Path:
    """The path, if it exists; otherwise raises a ValueError that names its most similar sibling."""
    expanded = pathlib.Path(path).expanduser()
    if expanded.exists():
        return expanded
    parent = expanded.parent
    if not parent.is_dir():
        raise ValueError(f"{path!r} does not exist; its folder {str(parent)!r} does not exist either")
    siblings = sorted(sibling.name for sibling in parent.iterdir())
    raise ValueError(f"{path!r} does not exist{nearest(expanded.name, siblings, cutoff=NEAR)}")


def _known(name: str, names: Any) -> str:
    return f"it has {', '.join(map(str, names)) or 'none'}{nearest(name, names, cutoff=NEAR)}"
