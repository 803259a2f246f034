"""The shuffled order of rows: each row comes once per epoch, and each epoch has a new order."""

from typing import Any


class ShuffledOrder:
    """The row number at each position of an endless stream; position ``p`` is in epoch ``p // num_rows``.

    Access is random and takes about 20 microseconds, so a position is the whole state of the stream.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        import grain  # takes a second, and toy tasks do not need it

        self._rows: Any = grain.MapDataset.source(range(num_rows)).seed(seed).shuffle().repeat()

    def __getitem__(self, position: int) -> int:
        return self._rows[position]
