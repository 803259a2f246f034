"""Which rollouts share a row."""

from collections.abc import Sequence


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """First-fit decreasing: the longest first, each into the first row that has room for it.

    Args:
        lengths: tokens of each rollout, prompt and response.
        row_tokens: room of a row.

    Returns:
        The rows, each with the indices of its rollouts; at most 11/9 of the fewest possible, plus one.

    Raises:
        ValueError: for a rollout that is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > row_tokens:
            raise ValueError(f"a rollout of {length} tokens does not fit into a row of {row_tokens}")
        row = next((r for r, left in enumerate(room) if left >= length), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(row_tokens)
        rows[row].append(index)
        room[row] -= length
    return rows
