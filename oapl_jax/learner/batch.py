"""Groups to the rows of a train batch, and the rows to the devices."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int

from oapl_jax.distributed.sharding import BATCH_AXES, row_shards, to_devices
from oapl_jax.types import FinishReason, Metrics, RolloutGroup, TrainBatch, Verdict

SHORTEST_ROW = 16

ROW_COUNT_BITS = 3
"""Significant bits of the number of rows of a packed batch of one micro-batch, so that few programs compile."""


class FullBatch(NamedTuple):
    """What a batch of rollouts of full length holds."""

    rows: int
    """That hold anything."""
    tokens: int
    scored: int
    """Response tokens."""
    pairs: int
    """Of a token and one that it sees."""


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """How the rollouts of a batch lie in rows."""

    num_rollouts: int
    """Most rollouts of a batch: of one update."""
    max_tokens: int
    """Limit of a rollout, prompt and response."""
    row_tokens: int | None = None
    """Length of rows that rollouts are packed into; None: one rollout a row, padded."""
    micro_batch_rows: int | None = None
    """Rows of a micro-batch; None: the batch is one."""
    mesh: Mesh | None = None
    """The trainer's, whose axes split the rows and their tokens; None: one device."""
    shares_prompts: bool = False
    """Whether rollouts of one prompt in a packed row share the prompt too."""
    group_size: int = 1
    """Rollouts of a prompt."""
    max_response_tokens: int = 1
    """Part of ``max_tokens``."""

    def __post_init__(self):
        """Raises ValueError for rows that cannot hold a rollout or do not divide over the mesh."""
        if self.row_tokens is not None and self.row_tokens < self.max_tokens:
            raise ValueError(
                f"learner.row_tokens={self.row_tokens} is less than the longest rollout, {self.max_tokens} tokens (prompt +"
                " response); raise it, or shorten the limits"
            )
        context = 1 if self.mesh is None else self.mesh.shape["context"]
        if (self.row_tokens or 0) % context:
            raise ValueError(
                f"learner.row_tokens={self.row_tokens} does not divide over context={context} of mesh.trainer; use a"
                f" multiple of {context}"
            )
        if self.micro_batch_rows is not None or self.row_tokens is None:
            rows, shards = self.micro_batch_rows or self.num_rollouts, self._row_shards
            if rows % shards:
                key = "micro_batch_rows" if self.micro_batch_rows else "batch_rollouts / updates_per_batch"
                raise ValueError(
                    f"learner.{key}={rows} does not divide over the {shards} row shards (data x fsdp) of mesh.trainer; use"
                    f" a multiple of {shards}"
                )

    @property
    def max_segments(self) -> int:
        """M: most rollouts of a row."""
        return self.num_rollouts if self.row_tokens else 1

    @property
    def _row_shards(self) -> int:
        return 1 if self.mesh is None else row_shards(self.mesh)

    def num_rows(self, num_used: int) -> int:
        """Rows of the arrays where ``num_used`` of them hold anything: few different numbers.

        With micro-batches it is always the most that there can be: the train step runs those that hold anything.
        """
        if self.micro_batch_rows is not None:
            return _round_up(self.num_rollouts, self.micro_batch_rows)
        if self.row_tokens is None:
            return self.num_rollouts
        of_shard = -(-num_used // self._row_shards)
        of_shard = _round_up(of_shard, 2 ** max(of_shard.bit_length() - ROW_COUNT_BITS, 0))
        return min(of_shard * self._row_shards, _round_up(self.num_rollouts, self._row_shards))

    @property
    def full(self) -> FullBatch:
        """The batch of rollouts that all have full length."""
        num_rollouts, length, shared = self.num_rollouts, self.max_tokens, 0
        num_pieces, of_row = num_rollouts, 1 if self.row_tokens is None else self.row_tokens // length
        if self.shares_prompts and self.row_tokens:
            length = self.max_response_tokens + 1
            shared = self.max_tokens - length
            num_groups, of_piece = -(-num_rollouts // self.group_size), (self.row_tokens - shared) // length
            num_pieces = num_groups * -(-self.group_size // of_piece)
            of_row = max(1, self.row_tokens // (shared + self.group_size * length))
        return FullBatch(
            rows=-(-num_pieces // of_row),
            tokens=num_pieces * shared + num_rollouts * length,
            scored=num_rollouts * self.max_response_tokens,
            pairs=num_pieces * shared * (shared + 1) // 2
            + num_rollouts * (length * (length + 1) // 2 + shared * length),
        )

    def row_length(self, num_tokens: int) -> int:
        """T: ``row_tokens``, or for rows of one rollout the limit or a half, a quarter, ... of it."""
        if num_tokens > self.max_tokens:
            raise ValueError(
                f"a rollout of {num_tokens} tokens exceeds the limit of {self.max_tokens} (prompt + response)"
            )
        if self.row_tokens is not None:
            return self.row_tokens
        length = self.max_tokens
        while length > SHORTEST_ROW and (length + 1) // 2 >= num_tokens:
            length = (length + 1) // 2
        return length if self.mesh is None else _round_up(length, self.mesh.shape["context"])


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """The rows of rollouts of these lengths, each with the indices of its rollouts, by first-fit decreasing.

    The longest comes first, each into the first row that has room for it: at most 11/9 of the fewest possible rows,
    plus one.
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


def from_groups(groups: Iterable[RolloutGroup], layout: RowLayout) -> TrainBatch:
    """The usable rollouts in rows, filled up with rows that hold nothing."""
    items = [(group.prompt, item) for group in groups for item in group.usable]
    return from_pairs(
        [(prompt.token_ids, item.rollout.token_ids) for prompt, item in items],
        layout,
        sampler_logprobs=[item.rollout.logprobs for _, item in items],
        advantages=[item.advantage for _, item in items],
    )


def from_pairs(
    pairs: Sequence[tuple[Int[np.ndarray, "_P"], Int[np.ndarray, "_R"]]],
    layout: RowLayout,
    *,
    sampler_logprobs: Sequence[np.ndarray] | None = None,
    advantages: Sequence[float] | None = None,
) -> TrainBatch:
    """Prompts and responses in rows; without sampler log-probabilities for supervised training.

    Raises:
        ValueError: too many pairs, or one that is too long.
    """
    if len(pairs) > layout.num_rollouts:
        raise ValueError(f"{len(pairs)} rollouts do not fit into a batch of {layout.num_rollouts}")
    length = layout.row_length(max(len(prompt) + len(response) for prompt, response in pairs))
    rows = _rows(pairs, layout)
    batch = make_batch(np.zeros, (layout.num_rows(len(rows)),), length, layout)
    for row, spans in enumerate(rows):
        start = segment = 0
        for number, (shared, members) in enumerate(spans, 1):
            first, start = start, start + shared
            batch.tokens[row, first:start] = pairs[members[0]][0][:shared]
            batch.positions[row, first:start] = np.arange(shared)
            for i in members:
                prompt, response = pairs[i]
                middle = start + len(prompt) - shared
                end = middle + len(response)
                batch.tokens[row, start:middle] = prompt[shared:]
                batch.tokens[row, middle:end] = response
                batch.positions[row, start:end] = np.arange(shared, shared + end - start)
                batch.segment_ids[row, start:end] = segment + 1
                batch.response_mask[row, middle:end] = True
                batch.segment_mask[row, segment] = True
                if sampler_logprobs is not None:
                    batch.sampler_logprobs[row, middle:end] = sampler_logprobs[i]
                if advantages is not None:
                    batch.advantages[row, segment] = advantages[i]
                start, segment = end, segment + 1
            if batch.prompt_ids is not None:
                batch.prompt_ids[row, first:start] = number
    return batch


def of_pairs(
    values: Float[np.ndarray, "B T"],
    batch: TrainBatch,
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    layout: RowLayout,
) -> list[Float[np.ndarray, "_R"]]:
    """The values of each pair's response tokens, where ``from_pairs`` made the batch of the pairs."""
    found = [np.zeros(0, np.float32)] * len(pairs)
    for row, spans in enumerate(_rows(pairs, layout)):
        for segment, i in enumerate((i for _, members in spans for i in members), 1):
            found[i] = values[row, (batch.segment_ids[row] == segment) & batch.response_mask[row]]
    return found


def of_groups(
    values: Float[np.ndarray, "B T"], batch: TrainBatch, groups: Sequence[RolloutGroup], layout: RowLayout
) -> list[list[Float[np.ndarray, "_R"]]]:
    """The values of the response tokens of each group's usable rollouts, where ``from_groups`` made the batch of them."""
    pairs = [(group.prompt.token_ids, item.rollout.token_ids) for group in groups for item in group.usable]
    found = iter(of_pairs(values, batch, pairs, layout))
    return [[next(found) for _ in group.usable] for group in groups]


def _rows(pairs: Sequence[tuple[np.ndarray, np.ndarray]], layout: RowLayout) -> list[list[tuple[int, list[int]]]]:
    """The rows; of each, its prompts: how many tokens of the prompt are shared, and the indices of its pairs."""
    if layout.row_tokens is None:
        return [[(0, [i])] for i in range(len(pairs))]
    if not layout.shares_prompts:
        lengths = [len(prompt) + len(response) for prompt, response in pairs]
        return [[(0, [i]) for i in row] for row in pack(lengths, layout.row_tokens)]
    groups: dict[bytes, list[int]] = {}
    for i, (prompt, _) in enumerate(pairs):
        groups.setdefault(np.asarray(prompt, np.int32).tobytes(), []).append(i)
    pieces, lengths = [], []
    for members in groups.values():
        # The prompt's last token stays with each response, whose first token it predicts.
        shared = len(pairs[members[0]][0]) - 1
        ends = [1 + len(pairs[i][1]) for i in members]
        for piece in pack(ends, layout.row_tokens - shared):
            pieces.append((shared, [members[i] for i in piece]))
            lengths.append(shared + sum(ends[i] for i in piece))
    return [[pieces[i] for i in row] for row in pack(lengths, layout.row_tokens)]


def place(batch: TrainBatch, layout: RowLayout) -> TrainBatch:
    """The batch on the devices of the layout's mesh, with a leading axis of micro-batches ``[A, B/A, ...]``."""
    rows = layout.micro_batch_rows or len(batch.tokens)
    split = jax.tree.map(lambda array: array.reshape(-1, rows, array.shape[1]), batch)
    return jax.device_put(split) if layout.mesh is None else jax.tree.map(to_devices, split, shardings(layout))


def shardings(layout: RowLayout) -> TrainBatch:
    """How a batch with its axis of micro-batches is sharded: rows over data and fsdp, tokens over context."""
    assert layout.mesh is not None
    tokens = NamedSharding(layout.mesh, PartitionSpec(None, BATCH_AXES, "context"))
    rollouts = NamedSharding(layout.mesh, PartitionSpec(None, BATCH_AXES))
    prompt_ids = tokens if layout.shares_prompts else None
    return TrainBatch(tokens, tokens, tokens, tokens, tokens, rollouts, rollouts, prompt_ids)


def padding(batch: TrainBatch, layout: RowLayout) -> float:
    """Fraction of the positions which the train step computes that hold no token."""
    rows = layout.micro_batch_rows or len(batch.tokens)
    num_computed = _round_up(int(batch.segment_mask.any(axis=1).sum()), rows) * batch.tokens.shape[1]
    return 1 - float(_holds_token(batch).sum()) / num_computed


def work(batch: TrainBatch) -> tuple[int, int, int]:
    """Tokens of a batch on the host, pairs of a token and one that it sees, and response tokens."""
    is_token = _holds_token(batch)
    return int(is_token.sum()), int(np.sum(batch.positions + 1, where=is_token)), int(batch.response_mask.sum())


def _holds_token(batch: TrainBatch) -> Bool[np.ndarray, "B T"]:
    return (batch.segment_ids if batch.prompt_ids is None else batch.prompt_ids) > 0


def make_batch(make: Any, rows: tuple[int, ...], length: int, layout: RowLayout) -> TrainBatch:
    """A batch of what ``make(shape, dtype)`` gives for each of its arrays."""
    tokens, rollouts = (*rows, length), (*rows, layout.max_segments)
    return TrainBatch(
        tokens=make(tokens, np.int32),
        positions=make(tokens, np.int32),
        segment_ids=make(tokens, np.int32),
        response_mask=make(tokens, bool),
        sampler_logprobs=make(tokens, np.float32),
        advantages=make(rollouts, np.float32),
        segment_mask=make(rollouts, bool),
        prompt_ids=make(tokens, np.int32) if layout.shares_prompts else None,
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def describe(groups: Sequence[RolloutGroup], sets: Iterable[str] = ()) -> Metrics:
    """``rollouts/*`` metrics of a batch, and ``rollouts/NAME/*`` of the data sets with a usable rollout in it."""
    usable = [item for group in groups for item in group.usable]
    num_rollouts = sum(len(group.rollouts) for group in groups)
    lengths = [len(item.rollout.token_ids) for item in usable]
    verdicts = [{item.grade.verdict for item in group.usable} for group in groups]
    mean_rewards = [np.mean([item.grade.reward for item in group.usable]) for group in groups]
    metrics = {
        "rollouts/reward": float(np.mean([item.grade.reward for item in usable])),
        "rollouts/pass_rate": float(np.mean([item.grade.verdict is Verdict.CORRECT for item in usable])),
        "rollouts/response_tokens": float(np.mean(lengths)),
        "rollouts/response_tokens_p50": float(np.percentile(lengths, 50)),
        "rollouts/response_tokens_p95": float(np.percentile(lengths, 95)),
        "rollouts/truncated": float(np.mean([item.rollout.finish_reason is FinishReason.LENGTH for item in usable])),
        "rollouts/equal_reward_groups": float(np.mean([has_equal_rewards(group) for group in groups])),
        "rollouts/all_correct": float(np.mean([found == {Verdict.CORRECT} for found in verdicts])),
        "rollouts/all_wrong": float(np.mean([Verdict.CORRECT not in found for found in verdicts])),
        "rollouts/invalid": 1 - len(usable) / num_rollouts,
        "rollouts/value": float(np.mean([group.value for group in groups])),
        "rollouts/value_gap": float(np.mean([group.value for group in groups]) - np.mean(mean_rewards)),
    }
    if finished := [item for item in usable if item.rollout.finish_reason is not FinishReason.LENGTH]:
        metrics["rollouts/finished_reward"] = float(np.mean([item.grade.reward for item in finished]))
    for name in sets:
        mine = [group for group in groups if group.prompt.id.startswith(f"{name}/")]
        found = describe(mine) if any(group.usable for group in mine) else {}
        metrics |= {key.replace("rollouts/", f"rollouts/{name}/"): value for key, value in found.items()}
        metrics[f"rollouts/{name}/groups"] = len(mine)
    return metrics


def has_equal_rewards(group: RolloutGroup) -> bool:
    """Whether all usable rollouts of a group have one reward: no advantage in it."""
    return len({item.grade.reward for item in group.usable}) <= 1
