"""Reads rows of tables in several formats: JSONL, Parquet, the ``datasets`` library, TFDS.

Each reader returns the wanted columns of all rows in the order of the source, or raises an error that says what is
missing. The libraries of the extra ``data`` are imported only by the readers that use them.
"""

import dataclasses
import importlib
import pathlib
from collections.abc import Sequence
from typing import Any

from oapl_jax.config.names import nearest
from oapl_jax.untrusted import parquet, reading

NEAR = 0.4
"""How similar a name must be to be suggested: file names of one data set differ little."""


@dataclasses.dataclass(frozen=True)
class Table:
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
    """Reads the ``columns`` of all rows, followed by the ``optional`` ones.

    Args:
        path: file, folder, or name of a dataset.
        file_format: ``jsonl``, ``parquet``, ``datasets`` or ``tfds``.
        columns: names of the wanted columns.
        name: configuration of the dataset, only for ``datasets``.
        split: split of the dataset, only for ``datasets`` and ``tfds``.
        optional: names of columns that may be missing, which makes their cells None.
        files: JSON files to read instead of ``path``, only for ``datasets``.

    Raises:
        ValueError: a file or column is missing, a row is broken, or there are no rows. The message has the most similar
            name that exists.
    """
    wanted = (*columns, *optional)
    if file_format == "jsonl":
        table = _read_json(_existing(path), columns, wanted)
    elif file_format == "parquet":
        table = _read_parquet(_existing(path), columns, wanted)
    elif file_format == "datasets":
        table = _read_datasets(path, columns, wanted, name, split, files)
    else:
        table = _read_tfds(path, columns, wanted, split)
    if not table.rows:
        raise ValueError(f"{path!r}: has no rows")
    return table


def string_cell(value: Any, column: str, row_name: str) -> str:
    """The cell as text. Numbers become their digits, since gold answers can be numbers; other types are errors."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str | bytes):
        raise ValueError(
            f"row {row_name}: column {column!r} is {value!r:.80} ({type(value).__name__}), not a string or a number"
        )
    try:
        return value.decode() if isinstance(value, bytes) else value.encode().decode()  # TFDS gives bytes
    except UnicodeError as error:
        raise ValueError(f"row {row_name}: column {column!r} has what is no Unicode text ({error})") from None


def _read_json(path: pathlib.Path, columns: Sequence[str], wanted: Sequence[str]) -> Table:
    """Reads a file with one JSON object per line, or with one array of objects; ``.gz`` is unpacked."""
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; the format 'jsonl' needs a file")
    text = reading.read_text(path)
    rows = []
    for number, record in enumerate(_records(path, text)):
        if not isinstance(record, dict):
            raise ValueError(f"{path} row {number}: is {type(record).__name__}, not an object")
        _require_columns(f"{path} row {number}", record, columns)
        rows.append(tuple(map(record.get, wanted)))
    return Table(path.name.removesuffix(".gz").rpartition(".")[0] or path.name, rows)


def _records(path: pathlib.Path, text: str) -> list[Any]:
    if text.startswith("PAR1"):
        raise ValueError(f"{path}: is a Parquet file; set data.format=parquet")
    if text.lstrip().startswith("["):
        return reading.parse_json(text, path)
    # splitlines() would also split at characters such as U+2028, which JSON strings may contain.
    lines = enumerate(text.split("\n"), start=1)
    return [reading.parse_json(line, f"{path} line {number}") for number, line in lines if line.strip()]


def _read_parquet(path: pathlib.Path, columns: Sequence[str], wanted: Sequence[str]) -> Table:
    """Reads a file, or all ``*.parquet`` files of a folder in the order of their names."""
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{str(path)!r}: the folder contains no *.parquet file")
    rows: list[tuple[Any, ...]] = []
    for file in files:

        def choose(names: list[str], file: pathlib.Path = file) -> list[str]:
            _require_columns(str(file), names, columns)
            return [column for column in wanted if column in names]

        table = parquet.read(file, file, choose)
        rows += _rows(table.to_pydict(), len(table), wanted)
    return Table(path.stem, rows)


def _rows(cells: dict[str, Any], num_rows: int, wanted: Sequence[str]) -> list[tuple[Any, ...]]:
    """Rows of the wanted columns, from the cells of those that there are."""
    return list(zip(*(cells.get(column, [None] * num_rows) for column in wanted), strict=True))


def _read_datasets(
    path: str, columns: Sequence[str], wanted: Sequence[str], name: str | None, split: str, files: Sequence[str]
) -> Table:
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
    if not isinstance(loaded, datasets.Dataset):
        raise ValueError(f"{path!r} split {split!r}: is a {type(loaded).__name__}, not a table")
    _require_columns(f"{path!r} split {split!r}", loaded.column_names, columns)
    cells = {column: loaded[column] for column in wanted if column in loaded.column_names}
    return Table(f"{pathlib.PurePath(path).name}/{split}", _rows(cells, len(loaded), wanted))


def _read_tfds(path: str, columns: Sequence[str], wanted: Sequence[str], split: str) -> Table:
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
    _require_columns(f"{path!r} split {split!r}", builder.info.features or {}, columns)
    source = builder.as_data_source(split=split)
    return Table(f"{builder.name}/{split}", [tuple(map(record.get, wanted)) for record in source])


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


def _require_columns(where: str, available: Any, wanted: Sequence[str]) -> None:
    for column in wanted:
        if column not in available:
            raise ValueError(f"{where}: has no column {column!r}; {_known(column, available)}")


def _known(name: str, names: Any) -> str:
    return f"it has {', '.join(map(str, names)) or 'none'}{nearest(name, names, cutoff=NEAR)}"
