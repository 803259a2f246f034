"""Entries of a dict that a config names as text."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


def entry(table: Mapping[str, Entry], name: str, key: str) -> Entry:
    """The entry of that name.

    Args:
        table: all entries.
        name: as the config gives it.
        key: of the config, for the message.

    Raises:
        ValueError: there is no such entry; names the nearest.
    """
    if name not in table:
        raise ValueError(f"{key}: unknown name {name!r}{did_you_mean(name, table)}")
    return table[name]


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message: the nearest known name, with the prefix before it, else all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {prefix + close[0]!r}?" if close else f"; known here: {', '.join(known)}"
