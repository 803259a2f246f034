"""Files that others wrote: only regular files, unpacked to a bounded size, JSON of a bounded depth."""

import gzip
import json
import pathlib
import zlib
from typing import Any

UNPACKED_BYTES, UNPACKED_RATIO = 32 * 2**20, 50
"""A compressed file of n bytes may have ``UNPACKED_BYTES + UNPACKED_RATIO * n`` bytes when it is unpacked: texts shrink to a
tenth, seldom to a thirtieth."""


def read_bytes(path: pathlib.Path) -> bytes:
    """The content of a regular file; what ends in ``.gz`` is unpacked.

    Raises a ValueError if it is no regular file, is damaged, or unpacks to too much.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is not a regular file; give one")
    if path.suffix != ".gz":
        return path.read_bytes()
    num_bytes = path.stat().st_size
    try:
        with gzip.open(path) as file:
            content = file.read(_most_unpacked(num_bytes) + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: is no whole gzip file ({error}); copy it again") from None
    check_unpacked(path, num_bytes, len(content))
    return content


def _most_unpacked(num_bytes: int) -> int:
    return UNPACKED_BYTES + UNPACKED_RATIO * num_bytes


def check_unpacked(path: Any, num_bytes: int, num_unpacked: int) -> None:
    """Refuses, by a ValueError, a compressed file that is far larger than its size on the disk."""
    if num_unpacked > _most_unpacked(num_bytes):
        raise ValueError(
            f"{path}: {num_bytes:,} bytes unpack to {num_unpacked:,} or more, over {UNPACKED_RATIO} times as many; if you"
            f" trust it, write it again without compression"
        )


def read_text(path: pathlib.Path) -> str:
    """A file of UTF-8, without its byte order mark; raises as ``read_bytes``, or ValueError where it is not UTF-8."""
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start:,} is not UTF-8 ({error.reason}); convert the file") from None


def parse_json(text: str | bytes, where: Any) -> Any:
    """A JSON value; raises a ValueError that names ``where`` if it is none, or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: is JSON that is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: is not JSON: {error}") from None


def parse_object(text: str | bytes, where: Any) -> dict[str, Any]:
    """A JSON object; raises as ``parse_json``, or where it is another value."""
    found = parse_json(text, where)
    if not isinstance(found, dict):
        raise ValueError(f"{where}: is a JSON {type(found).__name__}, not an object")
    return found


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """A file with a JSON object; raises as ``read_text`` and ``parse_object``."""
    return parse_object(read_text(path), path)
