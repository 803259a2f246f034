"""The Parquet layout of the offline datasets that the paper's authors have published: one row a response.

Their programs read ``prompt`` (chat messages), ``response``, ``precomputed_reward``, ``response_rewards`` (the
rewards of all responses to the prompt), ``reward_model.ground_truth``, ``extra_info`` and, where it is there,
``response_token_ids``. What else a rollout log holds goes to further columns, which their programs pass over,
so that nothing is lost on the way there and back. Ground truths that are JSON (tests of programs) are packed
as theirs are (``rewards/code/layouts.py``).
"""

import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from oapl_jax.rewards.code import layouts
from oapl_jax.rollouts import schema
from oapl_jax.types import RolloutGroup

GROUPS_AT_ONCE = 64
PACKED_PREFIXES = ("eJ", "eN", "eA", "eF")
"""How base64 of a zlib stream begins, at any level of compression."""
SHORTEST_PACKED = 24
"""A packed string has more characters; a gold answer that begins like one has fewer."""

LOG_COLUMNS = [
    "policy_version",
    "rollout_index",
    "finish_reason",
    "verdict",
    "verdict_detail",
    "value",
    "advantage",
    "extra",
]
"""Columns of a rollout log that are kept in ``extra_info``."""

SCHEMA = pa.schema(
    {
        "data_source": pa.string(),
        "prompt": pa.list_(pa.struct({"content": pa.string(), "role": pa.string()})),
        "ability": pa.string(),
        "reward_model": pa.struct({"ground_truth": pa.string(), "style": pa.string()}),
        "extra_info": pa.struct(
            {"index": pa.int64(), "split": pa.string()} | {name: schema.COLUMNS[name].type for name in LOG_COLUMNS}
        ),
        "response": pa.string(),
        "precomputed_reward": pa.float64(),
        "response_rewards": pa.list_(pa.float64()),
        "prompt_token_ids": pa.list_(pa.int32()),
        "response_token_ids": pa.list_(pa.int32()),
        "response_logprobs": pa.list_(pa.float32()),
    }
)


def write(path: pathlib.Path, groups: Iterable[RolloutGroup]) -> None:
    """Writes the groups' rollouts, whole or not at all.

    A rollout whose verdict is invalid has no reward and is not written: their programs would average over it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    groups = iter(groups)
    with pq.ParquetWriter(temporary, SCHEMA, compression="zstd", write_page_checksum=True) as writer:
        while batch := list(itertools.islice(groups, GROUPS_AT_ONCE)):
            rows = [row for group in batch for row in _rows(group)]
            writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
    temporary.replace(path)


def unpack_answer(ground_truth: str) -> str:
    """The gold answer of a ``ground_truth``: packed tests as JSON text, anything else as it stands.

    Raises:
        ValueError: for what looks packed and cannot be unpacked.
    """
    is_packed = len(ground_truth) >= SHORTEST_PACKED and ground_truth.startswith(PACKED_PREFIXES)
    return layouts.unpack(ground_truth) if is_packed and " " not in ground_truth else ground_truth


def _pack_answer(answer: str) -> str:
    try:
        is_json = isinstance(json.loads(answer), (dict, list))
    except ValueError:
        is_json = False
    return layouts.pack(answer) if is_json else answer


def _rows(group: RolloutGroup) -> list[dict[str, Any]]:
    graded = [index for index, item in enumerate(group.rollouts) if math.isfinite(item.grade.reward)]
    rewards = [group.rollouts[index].grade.reward for index in graded]
    return [_row(schema.row(group, index), rewards) for index in graded]


def _row(logged: dict[str, Any], rewards: list[float]) -> dict[str, Any]:
    source, _, _ = logged["prompt_id"].rpartition("/")
    kept = {name: logged[name] for name in LOG_COLUMNS}
    return {
        "data_source": logged["prompt_id"],
        "prompt": [{"content": logged["prompt"], "role": "user"}],
        "ability": source,
        "reward_model": {"ground_truth": _pack_answer(logged["answer"]), "style": "rule"},
        "extra_info": {"index": logged["group_index"], "split": "train", **kept},
        "response": logged["response"],
        "precomputed_reward": logged["reward"],
        "response_rewards": rewards,
        "prompt_token_ids": logged["prompt_token_ids"],
        "response_token_ids": logged["token_ids"],
        "response_logprobs": logged["logprobs"],
    }
