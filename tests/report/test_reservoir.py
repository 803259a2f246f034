import collections
import dataclasses
import itertools

import numpy as np
import pytest

from oapl_jax.report import reservoir
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.types import Grade, Verdict
from test_report import make_group


def graded(group, *grades):
    """The group with these rewards; None: an invalid verdict."""
    first = group.rollouts[0]
    rollouts = [
        dataclasses.replace(first, grade=Grade(Verdict.INVALID, float("nan"), f"timeout after {i} s"))
        if reward is None
        else dataclasses.replace(first, grade=Grade(Verdict.CORRECT if reward == 1 else Verdict.WRONG, reward))
        for i, reward in enumerate(grades)
    ]
    return dataclasses.replace(group, rollouts=tuple(rollouts))


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """20 versions of 12 groups; one group in version 17 is correct, and one in version 3 has no verdict."""
    log = RolloutLog(tmp_path_factory.mktemp("log"))
    for version in range(20):
        groups = [graded(make_group(i, version), 0.0, 0.0) for i in range(12)]
        if version == 17:
            groups[5] = graded(groups[5], 1.0, 0.0)
        if version == 3:
            groups[7] = graded(groups[7], None, None)
        log.append(groups[:6])
        log.append(groups[6:])
    return log


def test_rare_kinds_and_all_versions_are_among_few_rollouts(log):
    found = reservoir.read_log(log.directory, 40)
    names = [group.id for group in found.groups]
    assert len(names) == len(set(names)) == 20
    assert {"000017-00000005", "000003-00000007"} <= set(names)
    assert len({group.policy_version for group in found.groups}) >= 16
    assert all(len(group.rollouts) == 2 for group in found.groups)


def test_groups_with_recorded_log_ratios_are_shown_first_in_half_of_the_room(log):
    wanted = [f"{version:06d}-00000009" for version in range(20)]
    names = [group.id for group in reservoir.read_log(log.directory, 40, wanted).groups]
    assert len(set(names)) == 20
    assert len(set(names) & set(wanted)) == 10
    names = {group.id for group in reservoir.read_log(log.directory, 80, wanted).groups}
    assert {*wanted, "000017-00000005", "000003-00000007"} <= names, "the rest is chosen as without them"


def test_the_choice_depends_on_the_log_alone(log, tmp_path):
    first = reservoir.read_log(log.directory, 30)
    copy = RolloutLog(tmp_path)
    for version in log.versions():
        copy.append(log.read(version))  # in one file in place of two
    again = reservoir.read_log(copy.directory, 30)
    assert [group.id for group in again.groups] == [group.id for group in first.groups]


def test_all_rollouts_are_counted(log):
    found = reservoir.read_log(log.directory, 2)
    assert sum(counts.groups for counts in found.counts) == 240
    assert sum(counts.rollouts for counts in found.counts) == 480
    assert [counts.versions for counts in found.counts if counts.correct] == [(17, 17)]
    (third,) = (counts for counts in found.counts if counts.versions == (3, 3))
    assert (third.invalid, third.none_correct, third.all_correct) == (2, 12, 0)
    assert ("invalid", "timeout after # s", 2) in found.reasons
    assert not found.damaged


def test_versions_share_a_count_where_there_are_many(tmp_path):
    log = RolloutLog(tmp_path)
    for version in range(130):
        log.append([make_group(0, version)])
    found = reservoir.read_log(tmp_path, 10).counts
    assert len(found) <= 60
    assert [found[0].versions[0], found[-1].versions[1]] == [0, 129]
    assert sum(counts.rollouts for counts in found) == 260
    for before, after in itertools.pairwise(found):
        assert after.versions[0] == before.versions[1] + 1


def test_a_group_beyond_the_limit_is_left_out_and_smaller_ones_are_taken(tmp_path):
    log = RolloutLog(tmp_path)
    log.append([graded(make_group(0, 0), *np.zeros(30)), *(make_group(i, 0) for i in range(1, 20))])
    groups = reservoir.read_log(tmp_path, 20).groups
    assert collections.Counter(len(group.rollouts) for group in groups) == {2: 10}
