"""The columns of the rollout log, and groups to rows and back (docs/rollout_log.md)."""

import dataclasses
import itertools
import json
import math
import operator
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from oapl_jax.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, RolloutGroup, Verdict
from oapl_jax.untrusted import reading

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

OF_GROUP = ("group_index", "policy_version", "prompt_id", "prompt", "prompt_token_ids", "answer")
"""Columns in which the rollouts of a group agree."""
NAME = re.compile("[0-9]{6,9}-[0-9]{8}")
"""``RolloutGroup.id``."""

VERSION_KEY, SAMPLING_KEY, ENGINE_KEY = b"oapl_jax.schema_version", b"oapl_jax.sampling", b"oapl_jax.engine"

SCHEMA = pa.schema(
    [pa.field(name, column.type, column.is_nullable) for name, column in COLUMNS.items()],
    metadata={VERSION_KEY: str(SCHEMA_VERSION)},
)


def to_table(
    groups: Iterable[RolloutGroup], sampling: dict[str, Any] | None = None, engine: dict[str, Any] | None = None
) -> pa.Table:
    """Rows of the groups, rollouts of a group adjacent and in order.

    For the metadata: ``sampling``, the fields of the ``SamplingDistribution`` that all of them were drawn with, and
    ``engine``, what drew them.
    """
    rows = [row(group, index) for group in groups for index in range(len(group.rollouts))]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    notes = {SAMPLING_KEY: sampling, ENGINE_KEY: engine}
    given = {key: json.dumps(note) for key, note in notes.items() if note is not None}
    return table.replace_schema_metadata({**table.schema.metadata, **given})


def sampling_of(found: pa.Schema) -> dict[str, Any]:
    """The sampling parameters in a file's metadata; empty where it has none."""
    try:
        return reading.parse_object((found.metadata or {}).get(SAMPLING_KEY, b"{}"), "sampling")
    except ValueError:
        return {}


def sampling_problem(found: pa.Schema, expected: dict[str, Any]) -> str | None:
    """How a file says that its rollouts were drawn, where that is not as ``expected``; None where it is, or it does not say."""
    sampling = sampling_of(found)
    for name, wanted in json.loads(json.dumps(expected)).items():
        if name in sampling and sampling[name] != wanted:
            shown = f"{wanted:g}" if isinstance(wanted, int | float) else f"{wanted!r:.40}"
            return (
                f"was drawn at {name} {sampling[name]!r:.40}, and sampler.{name} is {shown}; set it to that of the data"
            )
    return None


def version_problem(found: pa.Schema) -> str | None:
    """Why a file of this schema cannot be read, where a newer program wrote it; None where it can."""
    version = (found.metadata or {}).get(VERSION_KEY, b"1").decode(errors="replace")
    if version in map(str, range(SCHEMA_VERSION + 1)):
        return None
    return (
        f"is a rollout log of schema version {ascii(version)[1:-1]:.20}, and this program reads versions up to {SCHEMA_VERSION};"
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
        ValueError: where the table is of another schema or has unknown words, or a group lacks a rollout, has one twice,
            or has two prompts; names ``source``.
    """
    table = select(table, list(COLUMNS), source)
    rows = sorted(_rows(table, source), key=operator.itemgetter("group_id", "rollout_index"))
    groups = []
    for name, rows_of_group in itertools.groupby(rows, key=operator.itemgetter("group_id")):
        members = list(rows_of_group)
        if not NAME.fullmatch(name):
            raise ValueError(f"{source}: has a group {name!r:.40}; their names are VERSION-INDEX")
        where = f"{source}: group {name}"
        indices = [cells["rollout_index"] for cells in members]
        if indices != list(range(len(members))):
            raise ValueError(f"{where} has rollouts {indices!s:.80}; each must be there once, from 0 on")
        for column in OF_GROUP:
            if any(_differ(cells[column], members[0][column]) for cells in members[1:]):
                raise ValueError(f"{where} has rollouts with different {column}")
        try:
            group = _group(members)
        except ValueError as error:  # no word for a verdict or an end, or a wrong length
            raise ValueError(f"{where}: {error}") from None
        if group.id != name:
            raise ValueError(f"{where} has policy_version {group.policy_version} and group_index {group.index}")
        groups.append(group)
    return groups


def _differ(one: Any, other: Any) -> bool:
    return not np.array_equal(one, other) if isinstance(one, np.ndarray) else one != other


def _rows(table: pa.Table, source: str) -> list[dict]:
    """The rows as Python values, but for lists: these become arrays without a Python object for each token."""
    columns = {}
    for field in SCHEMA:
        column = table.column(field.name)
        try:
            if not is_kind(column.type, field.type) and not pa.types.is_null(column.type):
                raise pa.ArrowInvalid("another type")
            column = column.cast(field.type)
        except pa.ArrowException as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{source}: column {field.name} is {column.type}, not {field.type} ({reason})") from error
        is_list = pa.types.is_list(field.type)
        tokens_null = field.type == _IDS and any(chunk.values.null_count for chunk in column.chunks)
        if tokens_null or (column.null_count and not COLUMNS[field.name].is_nullable):
            problem = "no text, number, list or token in it may be null"
            raise ValueError(f"{source}: column {field.name} has nulls; {problem}")
        columns[field.name] = list_cells(column) if is_list else column.to_pylist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def is_kind(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether a column of the one type can be read as the other: numbers and texts of any width, integers as numbers."""
    if pa.types.is_dictionary(found):
        found = found.value_type
    if pa.types.is_struct(wanted):
        return pa.types.is_struct(found) and all(
            found.get_field_index(field.name) >= 0 and is_kind(found.field(field.name).type, field.type)
            for field in wanted
        )
    if pa.types.is_list(wanted):
        is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
        return is_list and is_kind(found.value_type, wanted.value_type)
    if pa.types.is_string(wanted):
        return pa.types.is_string(found) or pa.types.is_large_string(found)
    return pa.types.is_integer(found) or (pa.types.is_floating(wanted) and pa.types.is_floating(found))


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
    prompt = Prompt(first["prompt_id"], first["prompt_token_ids"], first["prompt"], first["answer"])
    graded, value = tuple(map(_graded, rows)), _nan_if_null(first["value"])
    return RolloutGroup(first["group_index"], first["policy_version"], prompt, graded, value)


def _graded(row: dict) -> GradedRollout:
    num_tokens, num_logprobs = len(row["token_ids"]), len(row["logprobs"])
    if num_tokens != num_logprobs:
        raise ValueError(f"rollout {row['rollout_index']}: {num_logprobs} log-probabilities for {num_tokens} tokens")
    rollout = Rollout(row["token_ids"], row["logprobs"], FinishReason(row["finish_reason"]))
    grade = Grade(Verdict(row["verdict"]), _nan_if_null(row["reward"]), row["verdict_detail"])
    return GradedRollout(rollout, row["response"], grade, _nan_if_null(row["advantage"]), row["extra"])


def _null_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _nan_if_null(value: float | None) -> float:
    return math.nan if value is None else value
