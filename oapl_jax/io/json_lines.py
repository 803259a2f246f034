"""Files to which a run appends a JSON object a step: what a crash leaves of them, and what a resumed run keeps."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from oapl_jax.io import storage
from oapl_jax.untrusted import reading


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of the lines; none where there is no file. A last line that a crash tore in two is left out.

    Raises:
        ValueError: any other line is no object with a ``step``; it is named.
    """
    if not path.exists():
        return []
    *whole, last = reading.read_text(path).split("\n")
    found = []
    for number, line in enumerate([*whole, last] if last else whole, start=1):
        try:
            record = reading.parse_json(line, "it")
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise ValueError("it has no step")
        except ValueError as error:
            if number > len(whole):
                break  # no newline after it: the process was killed while it wrote
            raise ValueError(
                f"{path}: line {number} is damaged ({error}): {line[:80]!r}; remove it and the lines after it"
            ) from None
        found.append(record)
    return found


def keep(path: pathlib.Path, is_kept: Callable[[int], bool]) -> list[dict[str, Any]]:
    """Removes what a crash tore, and the lines of steps that are not kept; returns the others, as ``read`` does."""
    kept = [record for record in read(path) if is_kept(record["step"])]
    if path.exists():
        storage.replace(path, "".join(f"{json.dumps(record)}\n" for record in kept).encode())
    return kept
