"""Files to which a run appends a JSON object a step: what a crash leaves of them, and what a resumed run keeps."""

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from oapl_jax.io import storage
from oapl_jax.untrusted import reading


def stream(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The objects of the lines, one at a time; none where there is no file. A last line that a crash tore is left out.

    Raises:
        ValueError: any other line is no object with a ``step``; it is named.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise ValueError(f"{path}: is not a regular file; give one")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            is_whole = line.endswith(b"\n")
            try:
                record = reading.parse_json(line.removesuffix(b"\n").decode("utf-8-sig"), "it")
                if not isinstance(record, dict) or type(record.get("step")) is not int:
                    raise ValueError("it has no step")
            except ValueError as error:
                if not is_whole:
                    break  # the process was killed while it wrote
                shown = line[:80].decode(errors="replace").rstrip("\n")
                raise ValueError(
                    f"{path}: line {number} is damaged ({error}): {shown!r}; remove it and the lines after it"
                ) from None
            yield record


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """All of ``stream``."""
    return list(stream(path))


def append(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Writes one line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def keep(path: pathlib.Path, is_kept: Callable[[int], bool]) -> list[dict[str, Any]]:
    """Removes what a crash tore, and the lines of steps that are not kept; returns the others, as ``read`` does."""
    kept = [record for record in read(path) if is_kept(record["step"])]
    if path.exists():
        storage.replace(path, "".join(f"{json.dumps(record)}\n" for record in kept).encode())
    return kept
