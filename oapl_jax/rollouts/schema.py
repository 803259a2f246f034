"""The columns of the rollout log, and groups to rows and back (docs/rollout_log.md)."""

import dataclasses
import itertools
import json
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from oapl_jax.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, RolloutGroup, Verdict

SCHEMA_VERSION = 2
"""Raised by a change that a program of the version before would misread; a further optional column is none."""

REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Column:
    """What one column has in each row."""

    type: pa.DataType
    default: Any = REQUIRED
    """What its rows have where a file lacks the column; ``REQUIRED``: such a file is refused."""
    is_nullable: bool = False

    @property
    def is_required(self) -> bool:
        """Whether each file has it."""
        return self.default is REQUIRED


_TEXT, _IDS = pa.string(), pa.list_(pa.int32())
COLUMNS = {
    "group_id": Column(_TEXT),
    "group_index": Column(pa.int64()),
    "policy_version": Column(pa.int64()),
    "prompt_id": Column(_TEXT),
    "prompt": Column(_TEXT, ""),
    "prompt_token_ids": Column(_IDS),
    "answer": Column(_TEXT, ""),
    "rollout_index": Column(pa.int32()),
    "response": Column(_TEXT, ""),
    "token_ids": Column(_IDS),
    "logprobs": Column(pa.list_(pa.float32())),
    "finish_reason": Column(_TEXT),
    "verdict": Column(_TEXT),
    "verdict_detail": Column(_TEXT, ""),
    "reward": Column(pa.float64(), is_nullable=True),
    "value": Column(pa.float64(), None, is_nullable=True),
    "advantage": Column(pa.float64(), None, is_nullable=True),
    "extra": Column(_TEXT, "{}"),
}
"""The schema: one row a rollout. Columns that are not here are kept in the file and not read."""

VERSION_KEY, SAMPLING_KEY = b"oapl_jax.schema_version", b"oapl_jax.sampling"

SCHEMA = pa.schema(
    [pa.field(name, column.type, column.is_nullable) for name, column in COLUMNS.items()],
    metadata={VERSION_KEY: str(SCHEMA_VERSION)},
)


def to_table(groups: Iterable[RolloutGroup], sampling: dict[str, float] | None = None) -> pa.Table:
    """Rows of the groups, rollouts of a group adjacent and in order.

    ``sampling``, for the metadata: temperature, top_k, top_p and min_p that all of them were drawn with.
    """
    rows = [row(group, index) for group in groups for index in range(len(group.rollouts))]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    if sampling is None:
        return table
    return table.replace_schema_metadata({**table.schema.metadata, SAMPLING_KEY: json.dumps(sampling)})


def sampling_of(found: pa.Schema) -> dict[str, float]:
    """The sampling parameters in a file's metadata; empty where it has none."""
    try:
        sampling = json.loads((found.metadata or {}).get(SAMPLING_KEY, b"{}"))
    except ValueError:
        return {}
    return sampling if isinstance(sampling, dict) else {}


def version_problem(found: pa.Schema) -> str | None:
    """Why a file of this schema cannot be read, where a newer program wrote it; None where it can."""
    version = (found.metadata or {}).get(VERSION_KEY, b"1").decode()
    if version.isdigit() and int(version) <= SCHEMA_VERSION:
        return None
    return (
        f"is a rollout log of schema version {version}, and this program reads versions up to {SCHEMA_VERSION};"
        " update oapl_jax to the release that wrote it"
    )


def select(table: pa.Table, names: Sequence[str], source: str) -> pa.Table:
    """These columns of a table; optional ones that it lacks have their defaults.

    Raises:
        ValueError: the table is of a newer schema or lacks a required column; names ``source``.
    """
    if (problem := version_problem(table.schema)) is not None:
        raise ValueError(f"{source}: {problem}")
    missing = [name for name in names if name not in table.column_names]
    if lacking := [name for name in missing if COLUMNS[name].is_required]:
        raise ValueError(
            f"{source}: is no rollout log: it has no column {', '.join(lacking)} (docs/rollout_log.md);"
            f" it has {table.column_names}"
        )
    for name in missing:
        values = pa.array([COLUMNS[name].default] * table.num_rows, COLUMNS[name].type)
        table = table.append_column(SCHEMA.field(name), values)
    return table.select(list(names))


def from_table(table: pa.Table, source: str) -> list[RolloutGroup]:
    """The inverse of ``to_table``, also for a table of an older schema.

    Raises:
        ValueError: where the table is of another schema, or a group lacks a rollout or has one twice;
            names ``source``.
    """
    table = select(table, list(COLUMNS), source)
    if table.num_rows == 0:
        return []
    rows = sorted(_rows(table, source), key=operator.itemgetter("group_id", "rollout_index"))
    grouped = [list(members) for _, members in itertools.groupby(rows, key=operator.itemgetter("group_id"))]
    for members in grouped:
        indices = [cells["rollout_index"] for cells in members]
        if indices != list(range(len(members))):
            raise ValueError(
                f"{source}: group {members[0]['group_id']} has rollouts {indices}; each must be there once, from 0 on"
            )
    return [_group(members) for members in grouped]


def _rows(table: pa.Table, source: str) -> list[dict]:
    """The rows as Python values, but for lists: these become arrays without a Python object for each token."""
    columns = {}
    for field in SCHEMA:
        column = table.column(field.name)
        if not pa.types.is_list(field.type):
            columns[field.name] = column.to_pylist()
            continue
        try:
            column = column.cast(field.type)
        except pa.ArrowException as error:
            raise ValueError(f"{source}: column {field.name} is {column.type}, not {field.type} ({error})") from error
        tokens_null = pa.types.is_integer(field.type.value_type) and any(c.values.null_count for c in column.chunks)
        if column.null_count or tokens_null:
            raise ValueError(f"{source}: column {field.name} has nulls; no list and no token may be null")
        columns[field.name] = list_cells(column)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def list_cells(column: pa.ChunkedArray) -> list[np.ndarray | None]:
    """Lists of numbers as arrays: a list that is null as None, a number that is null as NaN."""
    cells = []
    for chunk in column.chunks:
        values, is_null = chunk.values.fill_null(0).to_numpy(), chunk.values.is_null().to_numpy(zero_copy_only=False)
        bounds, is_there = chunk.offsets.to_numpy(), chunk.is_valid().to_numpy(zero_copy_only=False)
        for (start, end), there in zip(itertools.pairwise(bounds), is_there, strict=True):
            cell, nulls = values[start:end].copy(), is_null[start:end]
            cells.append((np.where(nulls, np.nan, cell) if nulls.any() else cell) if there else None)
    return cells


def row(group: RolloutGroup, rollout_index: int) -> dict[str, Any]:
    """The cells of a rollout by column."""
    item = group.rollouts[rollout_index]
    return {
        "group_id": group.id,
        "group_index": group.index,
        "policy_version": group.policy_version,
        "prompt_id": group.prompt.id,
        "prompt": group.prompt.text,
        "prompt_token_ids": group.prompt.token_ids,
        "answer": group.prompt.answer,
        "rollout_index": rollout_index,
        "response": item.text,
        "token_ids": item.rollout.token_ids,
        "logprobs": item.rollout.logprobs,
        "finish_reason": item.rollout.finish_reason.value,
        "verdict": item.grade.verdict.value,
        "verdict_detail": item.grade.detail,
        "reward": _null_if_nan(item.grade.reward),
        "value": _null_if_nan(group.value),
        "advantage": _null_if_nan(item.advantage),
        "extra": item.extra,
    }


def _group(rows: list[dict]) -> RolloutGroup:
    first = rows[0]
    prompt = Prompt(
        id=first["prompt_id"],
        token_ids=first["prompt_token_ids"],
        text=first["prompt"],
        answer=first["answer"],
    )
    return RolloutGroup(
        index=first["group_index"],
        policy_version=first["policy_version"],
        prompt=prompt,
        rollouts=tuple(map(_graded, rows)),
        value=_nan_if_null(first["value"]),
    )


def _graded(row: dict) -> GradedRollout:
    rollout = Rollout(
        token_ids=row["token_ids"],
        logprobs=row["logprobs"],
        finish_reason=FinishReason(row["finish_reason"]),
    )
    grade = Grade(Verdict(row["verdict"]), _nan_if_null(row["reward"]), row["verdict_detail"])
    return GradedRollout(rollout, row["response"], grade, _nan_if_null(row["advantage"]), row["extra"])


def _null_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _nan_if_null(value: float | None) -> float:
    return math.nan if value is None else value
