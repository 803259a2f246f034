"""The columns of the rollout log, and groups to rows and back (docs/rollout_log.md)."""

import itertools
import json
import math
from collections.abc import Iterable

import pyarrow as pa

from oapl_jax.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, RolloutGroup, Verdict

SCHEMA_VERSION = 1

SCHEMA = pa.schema(
    [
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("group_index", pa.int64(), nullable=False),
        pa.field("policy_version", pa.int64(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("rollout_index", pa.int32(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("verdict", pa.string(), nullable=False),
        pa.field("verdict_detail", pa.string(), nullable=False),
        pa.field("reward", pa.float64()),
        pa.field("value", pa.float64()),
        pa.field("advantage", pa.float64()),
    ],
    metadata={"oapl_jax.schema_version": str(SCHEMA_VERSION)},
)
"""One row a rollout; reward, value and advantage are null where there is none."""


SAMPLING_KEY = b"oapl_jax.sampling"


def to_table(groups: Iterable[RolloutGroup], sampling: dict[str, float] | None = None) -> pa.Table:
    """Rows of the groups, rollouts of a group adjacent and in order.

    Args:
        groups: of one file.
        sampling: temperature, top_k, top_p and min_p that all of them were drawn with, for the metadata.
    """
    rows = [_row(group, index, item) for group in groups for index, item in enumerate(group.rollouts)]
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


def from_table(table: pa.Table, source: str) -> list[RolloutGroup]:
    """The inverse of ``to_table``.

    Raises:
        ValueError: where the table is of another schema, or a group lacks a rollout or has one twice;
            names ``source``.
    """
    found = (table.schema.metadata or {}).get(b"oapl_jax.schema_version", b"none").decode()
    if found != str(SCHEMA_VERSION) or table.schema.names != SCHEMA.names:
        raise ValueError(
            f"{source}: rollout log of schema version {found} with columns {table.schema.names};"
            f" this program reads version {SCHEMA_VERSION} (docs/rollout_log.md)"
        )
    if table.num_rows == 0:
        return []
    rows = sorted(_rows(table, source), key=lambda row: (row["group_id"], row["rollout_index"]))
    grouped = [list(members) for _, members in itertools.groupby(rows, key=lambda row: row["group_id"])]
    for members in grouped:
        indices = [row["rollout_index"] for row in members]
        if indices != list(range(len(members))):
            raise ValueError(
                f"{source}: group {members[0]['group_id']} has rollouts {indices}; each must be there once, from 0 on"
            )
    return [_group(members) for members in grouped]


def _rows(table: pa.Table, source: str) -> list[dict]:
    """The rows as Python values, but for lists: these become arrays without a Python object for each token."""
    columns = {}
    for field in SCHEMA:
        column = table.column(field.name).combine_chunks()
        if not pa.types.is_list(field.type):
            columns[field.name] = column.to_pylist()
            continue
        try:
            column = column.cast(field.type)
        except pa.ArrowException as error:
            raise ValueError(f"{source}: column {field.name} is {column.type}, not {field.type} ({error})") from error
        values = column.values
        if column.null_count or (values.null_count and pa.types.is_integer(values.type)):
            raise ValueError(f"{source}: column {field.name} has nulls; no list and no token may be null")
        values, bounds = values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()
        columns[field.name] = [values[start:end].copy() for start, end in itertools.pairwise(bounds)]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _row(group: RolloutGroup, rollout_index: int, item: GradedRollout) -> dict:
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
        rollouts=tuple(_graded(row) for row in rows),
        value=_nan_if_null(first["value"]),
    )


def _graded(row: dict) -> GradedRollout:
    rollout = Rollout(
        token_ids=row["token_ids"],
        logprobs=row["logprobs"],
        finish_reason=FinishReason(row["finish_reason"]),
    )
    grade = Grade(Verdict(row["verdict"]), _nan_if_null(row["reward"]), row["verdict_detail"])
    return GradedRollout(rollout, row["response"], grade, _nan_if_null(row["advantage"]))


def _null_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _nan_if_null(value: float | None) -> float:
    return math.nan if value is None else value
