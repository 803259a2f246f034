"""Files to which a run appends a JSON object a step: what a crash leaves of them, and what a resumed run keeps.

An object store cannot append. There such a file is a folder of parts, ``metrics.jsonl/000000``, ``000001`` and so on,
each of whole lines. An object is appended by writing the last part again, which happens at once or not at all; a part
that has ``PART_BYTES`` is followed by the next one. So a line costs at most that many bytes, however long the run is.
Parts are found by their numbers, because a listing may be late.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from oapl_jax.io import storage
from oapl_jax.io.storage import SharedPath
from oapl_jax.untrusted import reading

PART_BYTES = 2**18


def stream(path: SharedPath) -> Iterator[dict[str, Any]]:
    """The objects of the lines, one at a time; none where there is no file. A last line that a crash tore is left out.

    Raises:
        ValueError: any other line is no object with a ``step``; it is named.
    """
    for number, line in enumerate(_lines(path), start=1):
        try:
            record = reading.parse_json(line.removesuffix(b"\n").decode("utf-8-sig"), "it")
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise ValueError("it has no step")
        except ValueError as error:
            if not line.endswith(b"\n"):
                break  # the process was killed while it wrote
            shown = line[:80].decode(errors="replace").rstrip("\n")
            raise ValueError(
                f"{path}: line {number} is damaged ({error}): {shown!r}; remove it and the lines after it"
            ) from None
        yield record


def read(path: SharedPath) -> list[dict[str, Any]]:
    """All of ``stream``."""
    return list(stream(path))


class LineFile:
    """A file that a run appends to, of ``open_lines``; one process writes it."""

    def __init__(self, path: SharedPath, last: bytes = b"", number: int = 0):
        """In an object store, ``last`` is the content of the last part, and ``number`` its number."""
        self._path, self._last, self._number = path, last, number

    def append(self, record: dict[str, Any], *, is_durable: bool = False) -> None:
        """Adds a line. Where it is durable, or in an object store, it survives a crash of the machine when this returns."""
        if not storage.is_local(self._path):
            parts = _add([self._last], _line(record))
            self._number, self._last = self._number + len(parts) - 1, parts[-1]
            storage.replace(_part(self._path, self._number), self._last)
            return
        with pathlib.Path(str(self._path)).open("ab") as file:
            file.write(_line(record))
            file.flush()
            if is_durable:
                os.fsync(file.fileno())


def open_lines(path: SharedPath, is_kept: Callable[[int], bool]) -> tuple[LineFile, list[dict[str, Any]]]:
    """Removes what a crash tore, and the lines of steps that are not kept.

    Returns:
        The file, to go on with, and the objects of the lines that were kept.

    Raises:
        ValueError: as ``stream``.
    """
    kept = [record for record in stream(path) if is_kept(record["step"])]
    lines = [_line(record) for record in kept]
    if storage.is_local(path):
        pathlib.Path(str(path)).parent.mkdir(parents=True, exist_ok=True)
        if storage.exists(path):
            storage.replace(path, b"".join(lines))
        return LineFile(path), kept
    parts = [b""]
    for line in lines:
        _add(parts, line)
    # From the end on: a process that is killed here leaves the first of the lines that there were, without a gap.
    for number, before in reversed(list(enumerate(_parts(path)))):
        if number >= len(parts):
            storage.remove(_part(path, number))
        elif before != parts[number]:
            storage.replace(_part(path, number), parts[number])
    return LineFile(path, parts[-1], len(parts) - 1), kept


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _add(parts: list[bytes], line: bytes) -> list[bytes]:
    """Puts a line into the last part, or into a new one after it; returns the parts."""
    if parts[-1] and len(parts[-1]) + len(line) > PART_BYTES:
        parts.append(b"")
    parts[-1] += line
    return parts


def _lines(path: SharedPath) -> Iterator[bytes]:
    """What is there; a run that was copied from an object store has the folder of parts on a disk."""
    local = pathlib.Path(str(path))
    if not storage.is_local(path) or local.is_dir():
        for part in _parts(path):
            yield from part.splitlines(keepends=True)
    elif local.exists():
        if not local.is_file():
            raise ValueError(f"{path}: is not a regular file; give one")
        with local.open("rb") as file:
            yield from file


def _parts(path: SharedPath) -> list[bytes]:
    found: list[bytes] = []
    with contextlib.suppress(FileNotFoundError):
        while True:
            found.append(storage.read(_part(path, len(found))))
    return found


def _part(path: SharedPath, number: int) -> SharedPath:
    return path / f"{number:06d}"
