"""Rows of a table from any of the formats: JSONL, Parquet, the ``datasets`` library, TFDS.

Every reader returns the wanted columns of all rows, in the order of the source, or says what is missing.
"""

import dataclasses
import difflib
import gzip
import json
import pathlib
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Table:
    """The wanted columns of a source."""

    name: str
    """Begins the names of its rows: row 17 is ``NAME/17``."""
    rows: list[tuple[Any, ...]]
    """Cells in the order in which the columns were asked for."""


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
    """Reads ``columns`` of all rows, then those that are ``optional``.

    Args:
        path: file, folder, or name of a dataset.
        file_format: ``jsonl``, ``parquet``, ``datasets`` or ``tfds``.
        columns: names of the wanted columns.
        name: configuration, for ``datasets``.
        split: for ``datasets`` and ``tfds``.
        optional: names of columns that may be missing; their cells are then None.
        files: for ``datasets``: JSON files of which the dataset consists, instead of its name.

    Raises:
        ValueError: missing file, broken row, missing column, or no rows; names what is nearest.
    """
    if file_format == "jsonl":
        table = _read_json(_existing(path), columns, optional)
    elif file_format == "parquet":
        table = _read_parquet(_existing(path), columns, optional)
    elif file_format == "datasets":
        table = _read_datasets(path, columns, optional, name, split, files)
    else:
        table = _read_tfds(path, columns, optional, split)
    if not table.rows:
        raise ValueError(f"{path!r}: has no rows")
    return table


def string_cell(value: Any, column: str, row_name: str) -> str:
    """The cell as text. Whole numbers are taken for their digits (gold answers); anything else is a mistake."""
    if isinstance(value, bytes):  # TFDS
        return value.decode()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"row {row_name}: column {column!r} is {value!r} ({type(value).__name__}), not a string")
    return value


def _read_json(path: pathlib.Path, columns: Sequence[str], optional: Sequence[str]) -> Table:
    """A file with one JSON object a line, or with one array of objects; ``.gz`` is unpacked."""
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; format 'jsonl' wants a file")
    text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode("utf-8")
    records = _json_array(path, text) if text.lstrip().startswith("[") else _json_lines(path, text)
    rows = []
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{path} row {number}: is {type(record).__name__}, not an object")
        _require_columns(f"{path} row {number}", record, columns)
        rows.append(tuple(record.get(column) for column in (*columns, *optional)))
    return Table(path.name.removesuffix(".gz").rpartition(".")[0] or path.name, rows)


def _json_array(path: pathlib.Path, text: str) -> list[Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: is not a JSON array: {error}") from error


def _json_lines(path: pathlib.Path, text: str) -> list[Any]:
    records = []
    # Not splitlines(): JSON strings may hold its further line ends, such as U+2028, unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number}: is not JSON: {error}") from error
    return records


def _read_parquet(path: pathlib.Path, columns: Sequence[str], optional: Sequence[str]) -> Table:
    """A file, or all ``*.parquet`` of a folder in the order of their names."""
    import pyarrow.parquet

    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{str(path)!r}: the folder has no *.parquet file")
    rows: list[tuple[Any, ...]] = []
    for file in files:
        try:
            parquet = pyarrow.parquet.ParquetFile(file)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{file}: is not a Parquet file: {error}") from error
        _require_columns(str(file), parquet.schema_arrow.names, columns)
        table = parquet.read(columns=_present(columns, optional, parquet.schema_arrow.names))
        nothing = [None] * len(table)
        rows += zip(
            *(
                table.column(column).to_pylist() if column in table.column_names else nothing
                for column in (*columns, *optional)
            ),
            strict=True,
        )
    return Table(path.stem, rows)


def _read_datasets(
    path: str, columns: Sequence[str], optional: Sequence[str], name: str | None, split: str, files: Sequence[str]
) -> Table:
    """A folder written by ``save_to_disk``, or whatever ``load_dataset`` takes: a hub name, a folder of files."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{path!r}: {error}; pip install 'oapl-jax[data]'") from error

    if _looks_local(path):
        _existing(path)
    try:
        if pathlib.Path(path, "dataset_dict.json").is_file() or pathlib.Path(path, "state.json").is_file():
            loaded = datasets.load_from_disk(path)
        elif files:
            loaded = datasets.load_dataset("json", data_files=list(files), split=split)
        else:
            loaded = datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError) as error:  # all of the library's errors about names, splits and the network
        raise ValueError(f"{path!r}: the datasets library cannot load it: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"{path!r}: has no split {split!r}; it has {_listed(loaded)}{_nearest(split, loaded)}")
        loaded = loaded[split]
    if not isinstance(loaded, datasets.Dataset):
        raise ValueError(f"{path!r} split {split!r}: is a {type(loaded).__name__}, not a table")
    _require_columns(f"{path!r} split {split!r}", loaded.column_names, columns)
    nothing = [None] * len(loaded)
    present = _present(columns, optional, loaded.column_names)
    rows = list(
        zip(*(loaded[column] if column in present else nothing for column in (*columns, *optional)), strict=True)
    )
    return Table(f"{pathlib.PurePath(path).name}/{split}", rows)


def _read_tfds(path: str, columns: Sequence[str], optional: Sequence[str], split: str) -> Table:
    """A prepared dataset (array_record) by folder or by name, through ``as_data_source``: no TensorFlow."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(f"{path!r}: {error}; pip install 'oapl-jax[data]'") from error

    builder: Any
    if _looks_local(path) or pathlib.Path(path).is_dir():
        builder = tfds.builder_from_directory(_tfds_folder(_existing(path)))
    else:
        try:
            builder = tfds.builder(path, file_format="array_record")
            builder.download_and_prepare()
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"{path!r}: TFDS cannot load it: {error}") from error
    if split.partition("[")[0] not in builder.info.splits:  # train[:100] is a split too
        known = builder.info.splits
        raise ValueError(f"{path!r}: has no split {split!r}; it has {_listed(known)}{_nearest(split, known)}")
    _require_columns(f"{path!r} split {split!r}", builder.info.features or {}, columns)
    source = builder.as_data_source(split=split)
    rows = [tuple(record.get(column) for column in (*columns, *optional)) for record in source]
    return Table(f"{builder.name}/{split}", rows)


def _present(columns: Sequence[str], optional: Sequence[str], available: Sequence[str]) -> list[str]:
    return [*columns, *(column for column in optional if column in available)]


def _tfds_folder(folder: pathlib.Path) -> pathlib.Path:
    """The one prepared dataset (a folder with dataset_info.json) in or below ``folder``."""
    found = [info.parent for info in sorted(folder.rglob("dataset_info.json"))]
    if len(found) != 1:
        below = f"; choose one of {', '.join(map(str, found))}" if found else ""
        raise ValueError(f"{str(folder)!r}: holds {len(found)} prepared TFDS datasets, wanted one{below}")
    return found[0]


def _looks_local(path: str) -> bool:
    return path.startswith(("/", "./", "../", "~")) or path.count("/") > 1


def _existing(path: str) -> pathlib.Path:
    """``path``, which must exist; else an error that names its nearest sibling."""
    expanded = pathlib.Path(path).expanduser()
    if expanded.exists():
        return expanded
    parent = expanded.parent
    if not parent.is_dir():
        raise ValueError(f"{path!r} does not exist, nor does its folder {str(parent)!r}")
    siblings = sorted(sibling.name for sibling in parent.iterdir())
    raise ValueError(f"{path!r} does not exist{_nearest(expanded.name, siblings)}")


def _require_columns(where: str, available: Any, wanted: Sequence[str]) -> None:
    for column in wanted:
        if column not in available:
            raise ValueError(
                f"{where}: has no column {column!r}; it has {_listed(available)}{_nearest(column, available)}"
            )


def _listed(names: Any) -> str:
    return ", ".join(map(str, names)) or "none"


def _nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(map(str, names)), 1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""
