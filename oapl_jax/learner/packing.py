"""Which rollouts share a row."""

from collections.abc import Sequence


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """First-fit decreasing: the longest first, each into the first row that has room for it.

    Args:
        lengths: tokens of each rollout, prompt and response.
        row_tokens: room of a row; no rollout is longer.

    Returns:
        The rows, each with the indices of its rollouts; at most 11/9 of the fewest possible, plus one.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, left in enumerate(room) if left >= lengths[index]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(row_tokens)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows
