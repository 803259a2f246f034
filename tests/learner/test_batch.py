"""Groups to rows, and the metrics of a batch against values worked out by hand."""

import dataclasses
import math

import numpy as np
import pytest

from oapl_jax.learner.batch import RowLayout, describe, from_groups, from_pairs, has_equal_rewards, work
from oapl_jax.types import FinishReason, Grade, GradedRollout, Rollout, RolloutGroup, Verdict
from rollouts.groups import group, prompt, rollout


def item(length, verdict, advantage, finish_reason=FinishReason.STOP, reward=None):
    reward = (
        {Verdict.CORRECT: 1.0, Verdict.WRONG: 0.0, Verdict.INVALID: math.nan}[verdict] if reward is None else reward
    )
    tokens = Rollout(np.arange(length, dtype=np.int32) + 2, -np.ones(length, np.float32), finish_reason)
    return GradedRollout(tokens, "", Grade(verdict, reward), advantage)


def test_rows_hold_prompt_then_response_then_padding():
    whole = group(3)
    batch = from_groups([whole, group(4)], RowLayout(6, 40))
    assert batch.tokens.shape == (6, 10)
    assert batch.segment_mask[:, 0].tolist() == [True] * 4 + [False] * 2
    for row, (source, graded) in enumerate([(g, r) for g in (whole, group(4)) for r in g.rollouts]):
        start, size = len(source.prompt.token_ids), len(graded.rollout.token_ids)
        end = start + size
        assert batch.tokens[row, :start].tolist() == source.prompt.token_ids.tolist()
        assert batch.tokens[row, start:end].tolist() == graded.rollout.token_ids.tolist()
        assert not batch.tokens[row, end:].any()
        assert np.flatnonzero(batch.response_mask[row]).tolist() == list(range(start, end))
        assert batch.sampler_logprobs[row, start:end].tolist() == graded.rollout.logprobs.tolist()
        assert not batch.sampler_logprobs[row][~batch.response_mask[row]].any()
        assert batch.advantages[row, 0] == np.float32(graded.advantage)
    for array in (batch.tokens, batch.response_mask, batch.sampler_logprobs, batch.advantages):
        assert not array[4:].any(), "rows that only fill the batch are empty"
    assert batch.prompt_ids is None
    assert [array.dtype for array in batch[:7]] == [np.int32] * 3 + [bool, np.float32, np.float32, bool]


@pytest.mark.parametrize("row_tokens", [None, 12])
def test_the_work_of_a_batch_is_that_of_its_tokens(row_tokens):
    """Rollouts of 5 and 3 tokens, each of which sees itself and those before it; 3 + 1 of them are responses."""
    pairs = [
        (np.array([4, 5], np.int32), np.array([6, 7, 1], np.int32)),
        (np.array([4, 6], np.int32), np.array([1], np.int32)),
    ]
    assert work(from_pairs(pairs, RowLayout(4, 12, row_tokens))) == (8, 15 + 6, 4)


def test_a_shared_prompt_is_computed_once():
    """Of three prompt tokens two lie in the row once; the third begins each response, and sees the first two."""
    question = np.array([4, 5, 6], np.int32)
    pairs = [(question, np.array([7, 1], np.int32)), (question, np.array([1], np.int32))]
    batch = from_pairs(pairs, RowLayout(4, 16, 16, shares_prompts=True))
    assert work(batch) == (2 + 3 + 2, (1 + 2) + (3 + 4 + 5) + (3 + 4), 3)


def test_rollouts_that_cannot_be_used_are_no_rows():
    rng = np.random.default_rng(0)
    verdicts = [Verdict.CORRECT, Verdict.INVALID, Verdict.WRONG, Verdict.CORRECT]
    rollouts = [rollout(rng, 4, verdict, advantage=0.25 * i) for i, verdict in enumerate(verdicts)]
    rollouts[3] = item(4, Verdict.CORRECT, math.nan)  # a log-probability was not finite
    batch = from_groups([RolloutGroup(0, 0, prompt(0), tuple(rollouts), 0.5)], RowLayout(4, 16))
    assert batch.segment_mask[:, 0].tolist() == [True, True, False, False]
    assert batch.advantages[:, 0].tolist() == [0.0, 0.5, 0.0, 0.0]
    assert all(np.isfinite(array).all() for array in batch[:7])


def test_supervised_pairs_have_no_sampler_logprobs_and_no_advantage():
    pair = (np.array([4, 5], np.int32), np.array([6, 7, 1], np.int32))
    batch = from_pairs([pair], RowLayout(2, 16))
    assert batch.tokens[0, :6].tolist() == [4, 5, 6, 7, 1, 0]
    assert not batch.sampler_logprobs.any()
    assert not batch.advantages.any()


@pytest.mark.parametrize("limit", [16, 18, 40, 1024, 1000, 5])
def test_rows_are_padded_to_few_lengths_and_never_to_double(limit):
    lengths = {n: RowLayout(1, limit).row_length(n) for n in range(1, limit + 1)}
    assert all(n <= length <= limit for n, length in lengths.items())
    assert len(set(lengths.values())) <= 1 + max(0, math.ceil(math.log2(limit / 8)))
    assert all(length < 2 * n + 1 for n, length in lengths.items() if n > 16)
    assert list(lengths.values()) == sorted(lengths.values())


def test_a_row_beyond_the_limit_and_too_many_rollouts_are_errors():
    with pytest.raises(ValueError, match="a rollout of 41 tokens exceeds the limit of 40"):
        RowLayout(1, 40).row_length(41)
    with pytest.raises(ValueError, match="4 rollouts do not fit into a batch of 3"):
        from_groups([group(0), group(1)], RowLayout(3, 40))


def test_metrics_of_a_batch_are_what_they_are_by_hand():
    correct, wrong, invalid = Verdict.CORRECT, Verdict.WRONG, Verdict.INVALID
    groups = [
        RolloutGroup(
            *(0, 0, prompt(0)),
            (
                item(2, correct, 0.3),
                item(4, wrong, -0.7, FinishReason.LENGTH),
                item(6, wrong, -0.7),
                item(50, invalid, math.nan, FinishReason.LENGTH),
            ),
            0.7,
        ),
        RolloutGroup(
            *(1, 0, prompt(1)),
            (
                item(1, correct, 0.0),
                item(3, correct, 0.0),
                item(90, correct, math.nan),
                item(8, correct, 0.0, FinishReason.LENGTH),
            ),
            1.0,
        ),
    ]
    assert describe(groups) == pytest.approx(
        {
            "rollouts/reward": 4 / 6,
            "rollouts/finished_reward": 3 / 4,
            "rollouts/pass_rate": 4 / 6,
            "rollouts/response_tokens": (2 + 4 + 6 + 1 + 3 + 8) / 6,
            "rollouts/response_tokens_p50": 3.5,
            "rollouts/response_tokens_p95": 6 + 0.75 * (8 - 6),
            "rollouts/truncated": 2 / 6,
            "rollouts/equal_reward_groups": 1 / 2,
            "rollouts/all_correct": 1 / 2,
            "rollouts/all_wrong": 0.0,
            "rollouts/invalid": 2 / 8,
            "rollouts/value": 0.85,
            "rollouts/value_gap": ((0.7 - 1 / 3) + (1.0 - 1.0)) / 2,
        }
    )


def test_a_partial_reward_is_no_pass():
    half = RolloutGroup(
        0, 0, prompt(0), (item(1, Verdict.WRONG, 0.0, reward=0.5), item(1, Verdict.CORRECT, 0.0, reward=0.5)), 0.5
    )
    metrics = describe([half])
    assert (metrics["rollouts/reward"], metrics["rollouts/pass_rate"]) == (0.5, 0.5)
    assert metrics["rollouts/equal_reward_groups"] == 1


def test_equal_rewards_are_judged_by_usable_rollouts_only():
    assert has_equal_rewards(
        RolloutGroup(0, 0, prompt(0), (item(1, Verdict.CORRECT, 0.0), item(1, Verdict.INVALID, math.nan)), 1.0)
    )
    assert not has_equal_rewards(group(0))


def test_each_data_set_has_the_same_metrics_of_its_groups():
    right, wrong = item(1, Verdict.CORRECT, 0.0), item(3, Verdict.WRONG, 0.0, reward=0.0)
    groups = [
        RolloutGroup(0, 0, dataclasses.replace(prompt(i), id=name), (member, member), member.grade.reward)
        for i, (name, member) in enumerate([("a/0", right), ("ab/7", wrong), ("a/1", wrong)])
    ]
    metrics = describe(groups, ["a", "ab", "none"])
    assert {name: value for name, value in metrics.items() if name.endswith(("reward", "groups"))} == pytest.approx(
        {
            "rollouts/reward": 1 / 3,
            "rollouts/finished_reward": 1 / 3,
            "rollouts/equal_reward_groups": 1.0,
            "rollouts/a/reward": 1 / 2,
            "rollouts/a/finished_reward": 1 / 2,
            "rollouts/a/equal_reward_groups": 1.0,
            "rollouts/a/groups": 2,
            "rollouts/ab/reward": 0.0,
            "rollouts/ab/finished_reward": 0.0,
            "rollouts/ab/equal_reward_groups": 1.0,
            "rollouts/ab/groups": 1,
            "rollouts/none/groups": 0,
        }
    )
    assert metrics["rollouts/a/response_tokens"] == 2
    assert (metrics["rollouts/all_correct"], metrics["rollouts/all_wrong"]) == pytest.approx((1 / 3, 2 / 3))
