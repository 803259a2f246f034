"""Filters of a rollout log: what is left and what is counted."""

import dataclasses

import numpy as np

import groups
from oapl_jax.config.offline import FilterConfig
from oapl_jax.rollouts import filters
from oapl_jax.types import FinishReason, RolloutGroup, Verdict


def group(index: int, verdicts: str, cut: str = "") -> RolloutGroup:
    """``verdicts`` of C and W; ``cut`` marks with x those that were cut."""
    rng, kinds = np.random.default_rng(index), {"C": Verdict.CORRECT, "W": Verdict.WRONG}
    rollouts = []
    for i, letter in enumerate(verdicts):
        item = groups.rollout(rng, 3, kinds[letter])
        reason = FinishReason.LENGTH if cut[i : i + 1] == "x" else FinishReason.STOP
        rollouts.append(dataclasses.replace(item, rollout=dataclasses.replace(item.rollout, finish_reason=reason)))
    return RolloutGroup(index, 0, groups.prompt(index), tuple(rollouts), 0.5)


LOG = [
    group(0, "WWWW"),
    group(1, "CWWW"),
    group(2, "CCCW"),
    group(3, "CCCC"),
    group(4, "CCWW", "-xx-"),
    group(5, "CW", "x"),
]


def indices(kept):
    return [item.index for item in kept]


def test_nothing_is_dropped_by_default():
    kept, counts = filters.apply(LOG, FilterConfig(), seed=0)
    assert indices(kept) == [0, 1, 2, 3, 4, 5]
    assert (counts.groups, counts.kept) == (6, 6)


def test_the_number_of_correct_responses():
    kept, counts = filters.apply(LOG, FilterConfig(min_correct=1, max_correct=3), seed=0)
    assert indices(kept) == [1, 2, 4, 5]
    assert (counts.too_few_correct, counts.too_many_correct, counts.kept) == (1, 1, 4)
    assert str(counts) == "kept 4 of 6 groups; dropped: 1 too few correct, 1 too many correct"


def test_cut_responses_are_left_out_before_the_correct_ones_are_counted():
    kept, counts = filters.apply(LOG, FilterConfig(finished_only=True, max_correct=1), seed=0)
    assert indices(kept) == [0, 1, 4]
    assert [len(item.rollouts) for item in kept] == [4, 4, 2]
    assert (counts.truncated_rollouts, counts.small_groups, counts.too_many_correct) == (3, 1, 2)


def test_a_random_subset_of_prompts_follows_the_seed_and_comes_last():
    log = [group(i, "CW" if i % 2 else "WW") for i in range(40)]
    kept, counts = filters.apply(log, FilterConfig(min_correct=1, prompts=5), seed=1)
    assert len(kept) == 5
    assert all(item.index % 2 for item in kept)
    assert indices(kept) == sorted(indices(kept))
    assert (counts.too_few_correct, counts.not_in_subset) == (20, 15)
    assert indices(filters.apply(log, FilterConfig(min_correct=1, prompts=5), seed=1)[0]) == indices(kept)
    assert indices(filters.apply(log, FilterConfig(min_correct=1, prompts=5), seed=2)[0]) != indices(kept)
    assert len(filters.apply(log, FilterConfig(prompts=100), seed=1)[0]) == 40
