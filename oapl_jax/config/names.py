"""Entries of a dict that a config names as text."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Entry = TypeVar("Entry")


def entry(table: Mapping[str, Entry], name: str, key: str) -> Entry:
    """The entry that ``key`` of a config names.

    Raises:
        ValueError: there is no such entry; names the nearest.
    """
    if name not in table:
        raise ValueError(f"{key}: unknown name {name!r}{did_you_mean(name, table)}")
    return table[name]


def nearest(name: str, known: Iterable[Any], prefix: str = "", cutoff: float = 0.6) -> str:
    """The end of a message: the known name that is nearest, with the prefix before it; '' where none is near."""
    close = difflib.get_close_matches(name, list(map(str, known)), 1, cutoff)
    return f"; did you mean {prefix + close[0]!r}?" if close else ""


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message: the nearest known name, with the prefix before it, else all of them."""
    known = list(known)
    return nearest(name, known, prefix) or f"; known here: {', '.join(known)}"
