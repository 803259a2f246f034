"""Parquet files that others wrote: checked checksums, a bounded size, one kind of error."""

import io
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from oapl_jax.untrusted import reading

MOST_BATCHES, FEWEST_BATCHES = 4096, 16
"""In which a file is read, where its limits are not known and where they are."""
MOST_BYTES, MOST_RATIO = 256 * 2**20, 50
"""A file of n bytes may have ``MOST_BYTES + MOST_RATIO * n`` bytes in memory."""
_DAMAGED = (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError, MemoryError)


class Limits(NamedTuple):
    """The most rows that a file may have, and bytes in memory, where that is known."""

    num_rows: int
    num_bytes: int


def read(
    source: pathlib.Path | bytes,
    where: object,
    choose: Callable[[list[str]], list[str]] | None = None,
    limits: Limits | None = None,
) -> pa.Table:
    """A Parquet file, by path or content; a ValueError calls it ``where`` if it is damaged or beyond the limits.

    Args:
        source: the file.
        where: what errors call it.
        choose: the columns to be read, of those that there are; default all.
        limits: default: bytes that go with its size.
    """
    # Whole in memory: a damaged file cannot fault a mapped page.
    content = reading.read_bytes(source) if isinstance(source, pathlib.Path) else source
    try:
        file = pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True)
        # Not the metadata of its columns: the library ends the process where they are damaged.
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
        schema = file.schema_arrow
    except _DAMAGED as error:
        raise _unreadable(where, error) from error
    num_batches = FEWEST_BATCHES
    if limits is None:
        num_batches = MOST_BATCHES
        limits = Limits(2**62, MOST_BYTES + MOST_RATIO * len(content))
        reading.check_unpacked(where, len(content), sum(sizes))
    if file.metadata.num_rows > limits.num_rows or sum(sizes) > limits.num_bytes:
        raise ValueError(
            f"{where}: has {file.metadata.num_rows:,} rows and unpacks to {sum(sizes):,} bytes; it may have"
            f" {limits.num_rows:,} rows and {limits.num_bytes:,} bytes"
        )
    if len(set(schema.names)) < len(schema.names):
        raise ValueError(f"{where}: has two columns of one name; it has {schema.names}")
    columns = schema.names if choose is None else choose(schema.names)
    try:
        return _bounded(file, columns, limits.num_bytes, num_batches)
    except _DAMAGED as error:
        raise _unreadable(where, error) from error


def _bounded(file: pq.ParquetFile, columns: list[str], most_bytes: int, num_batches: int) -> pa.Table:
    """A few rows at a time: encodings shrink repeated values too, so that a few bytes may stand for many rows."""
    num_bytes, batches = 0, []
    num_rows = max(1, file.metadata.num_rows // num_batches)
    for batch in file.iter_batches(
        num_rows, columns=columns, use_threads=False
    ):  # for few rows threads take twice the time
        batch.validate(full=True)
        batches.append(batch)
        num_bytes += batch.nbytes
        if num_bytes > most_bytes:
            raise pa.ArrowInvalid(f"its rows take more than {most_bytes:,} bytes")
    fields = [file.schema_arrow.field(name) for name in columns]
    return pa.Table.from_batches(batches, pa.schema(fields, file.schema_arrow.metadata))


def _unreadable(where: object, error: BaseException) -> ValueError:
    reason = str(error).partition("\n")[0]
    return ValueError(f"{where}: is not a readable Parquet file ({reason}); copy it again, or move it away")
