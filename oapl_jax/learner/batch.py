"""Groups to the rows of a train batch."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

from oapl_jax.types import FinishReason, Metrics, RolloutGroup, TrainBatch, Verdict

SHORTEST_ROW = 16


def row_length(num_tokens: int, max_tokens: int) -> int:
    """The padded length of rows: the limit, or a half, a quarter, ... of it, so that few programs compile.

    Raises:
        ValueError: for a row beyond the limit.
    """
    if num_tokens > max_tokens:
        raise ValueError(f"a row of {num_tokens} tokens exceeds the limit of {max_tokens} (prompt + response)")
    length = max_tokens
    while length > SHORTEST_ROW and (length + 1) // 2 >= num_tokens:
        length = (length + 1) // 2
    return length


def from_groups(groups: Iterable[RolloutGroup], *, num_rows: int, max_tokens: int) -> TrainBatch:
    """Usable rollouts as rows, filled up to ``num_rows`` with rows that do not count."""
    items = [(group.prompt, item) for group in groups for item in group.usable]
    return from_pairs(
        [(prompt.token_ids, item.rollout.token_ids) for prompt, item in items],
        num_rows=num_rows,
        max_tokens=max_tokens,
        sampler_logprobs=[item.rollout.logprobs for _, item in items],
        advantages=[item.advantage for _, item in items],
    )


def from_pairs(
    pairs: Sequence[tuple[Int[np.ndarray, "_P"], Int[np.ndarray, "_R"]]],
    *,
    num_rows: int,
    max_tokens: int,
    sampler_logprobs: Sequence[np.ndarray] | None = None,
    advantages: Sequence[float] | None = None,
) -> TrainBatch:
    """Prompts and responses as right-padded rows; without sampler log-probabilities for supervised training."""
    if len(pairs) > num_rows:
        raise ValueError(f"{len(pairs)} rollouts do not fit into a batch of {num_rows} rows")
    length = row_length(max(len(prompt) + len(response) for prompt, response in pairs), max_tokens)
    batch = TrainBatch(
        tokens=np.zeros((num_rows, length), np.int32),
        response_mask=np.zeros((num_rows, length), bool),
        sampler_logprobs=np.zeros((num_rows, length), np.float32),
        advantages=np.zeros(num_rows, np.float32),
        row_mask=np.arange(num_rows) < len(pairs),
    )
    for row, (prompt, response) in enumerate(pairs):
        start, end = len(prompt), len(prompt) + len(response)
        batch.tokens[row, :start] = prompt
        batch.tokens[row, start:end] = response
        batch.response_mask[row, start:end] = True
        if sampler_logprobs is not None:
            batch.sampler_logprobs[row, start:end] = sampler_logprobs[row]
    if advantages is not None:
        batch.advantages[: len(pairs)] = advantages
    return batch


def describe(groups: Sequence[RolloutGroup]) -> Metrics:
    """``rollouts/*`` metrics of a batch (docs/metrics.md)."""
    usable = [item for group in groups for item in group.usable]
    num_rollouts = sum(len(group.rollouts) for group in groups)
    return {
        "rollouts/reward": float(np.mean([item.grade.reward for item in usable])),
        "rollouts/pass_rate": float(np.mean([item.grade.verdict is Verdict.CORRECT for item in usable])),
        "rollouts/response_tokens": float(np.mean([len(item.rollout.token_ids) for item in usable])),
        "rollouts/truncated": float(np.mean([item.rollout.finish_reason is FinishReason.LENGTH for item in usable])),
        "rollouts/equal_reward_groups": float(np.mean([has_equal_rewards(group) for group in groups])),
        "rollouts/invalid": 1 - len(usable) / num_rollouts,
        "rollouts/value": float(np.mean([group.value for group in groups])),
    }


def has_equal_rewards(group: RolloutGroup) -> bool:
    """Whether all usable rollouts of a group have one reward: no advantage in it."""
    return len({item.grade.reward for item in group.usable}) <= 1
