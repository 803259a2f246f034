"""Endless streams with random access: a position is the whole state, so a resumed run goes on exactly where it stopped."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
TRIED = 64
"""Items of an endless stream that are made at once, for their errors."""


class Shuffled(Generic[Item]):
    """Rows of a file, in a new order each epoch; position ``p`` is in epoch ``p // len(stream)``.

    Args:
        items: in the order of the file.
        num_dropped: number of rows that were left out because they exceed a limit or cannot be graded.
        seed: of the order.
    """

    def __init__(self, items: Sequence[Item], num_dropped: int, seed: int) -> None:
        import grain  # takes a second, and toy tasks do not need it

        self.items, self.num_dropped = items, num_dropped
        self._order: Any = grain.MapDataset.source(range(len(items))).seed(seed).shuffle().repeat()

    def __len__(self) -> int:
        """Number of items in an epoch."""
        return len(self.items)

    def __getitem__(self, position: int) -> Item:
        return self.items[self._order[position]]


class Made(Generic[Item]):
    """Items that are made from their positions and never repeat; some are made at once, to raise their errors now."""

    items: Sequence[Item] = ()
    num_dropped = 0

    def __init__(self, make: Callable[[int], Item]) -> None:
        self._make = make
        for position in range(TRIED):
            make(position)

    def __len__(self) -> int:
        """``sys.maxsize``, because there is no second epoch."""
        return sys.maxsize

    def __getitem__(self, position: int) -> Item:
        return self._make(position)


class Mixed(Generic[Item]):
    """Several streams in one: each position is the next item of one of them.

    Of any first ``n`` positions a stream has its share, by weight, to within one item for each other stream.
    """

    def __init__(self, streams: Mapping[str, Shuffled[Item] | Made[Item]], weights: Mapping[str, float]) -> None:
        self.streams = streams
        self.items = [item for stream in streams.values() for item in stream.items]
        self.num_dropped = sum(stream.num_dropped for stream in streams.values())
        exact = [Fraction(str(weights[name])) for name in streams]
        self._shares = [weight / sum(exact[i:]) for i, weight in enumerate(exact)]
        """Each stream's share of what the streams before it leave."""

    def __len__(self) -> int:
        """``sys.maxsize``: the streams repeat at different positions."""
        return sys.maxsize

    def __getitem__(self, position: int) -> Item:
        *streams, last = self.streams.values()
        for stream, share in zip(streams, self._shares, strict=False):
            before = math.floor(position * share)
            if math.floor((position + 1) * share) > before:
                return stream[before]
            position -= before
        return last[position]
