"""The order in which rows are visited: every row once an epoch, reshuffled each epoch."""

import grain


class ShuffledOrder:
    """Row number at any position of an endless stream; position ``p`` lies in epoch ``p // num_rows``.

    Random access (about 20 microseconds), so that the position is the whole state of the stream.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        self._rows = grain.MapDataset.source(range(num_rows)).seed(seed).shuffle().repeat()

    def __getitem__(self, position: int) -> int:
        row = self._rows[position]
        assert row is not None  # only a filtered MapDataset has holes
        return row
