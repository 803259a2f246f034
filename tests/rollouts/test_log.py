"""The rollout log gives back what it was given, or says what is wrong with which file."""

import dataclasses
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oapl_jax.rollouts import schema
from oapl_jax.rollouts.log import BatchRecord, RolloutLog
from oapl_jax.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, RolloutGroup, Verdict
from rollouts.groups import bits, group, prompt, rollout


def odd_group(index=5, version=3):
    """Every value that could get lost: NaN, infinities, -0.0, the last bit, empty lists, line ends, all enums."""
    logprobs = np.array([math.nan, -math.inf, -0.0, np.nextafter(np.float32(-1), np.float32(0)), -1e-45], np.float32)
    third = 1 / 3
    rollouts = (
        GradedRollout(
            Rollout(np.array([0, 1, 2**31 - 1, 7, 7], np.int32), logprobs, FinishReason.LENGTH),
            'line\nend, "quoted", \x00, \U0001f600',
            Grade(Verdict.WRONG, -third, "detail\t"),
            math.nan,
        ),
        GradedRollout(
            Rollout(np.zeros(0, np.int32), np.zeros(0, np.float32), FinishReason.STOP),
            "",
            Grade(Verdict.INVALID, math.nan, ""),
            math.nan,
        ),
        GradedRollout(
            Rollout(np.array([3], np.int32), np.array([-third], np.float32), FinishReason.STOP),
            "x",
            Grade(Verdict.CORRECT, np.nextafter(1.0, 2.0), ""),
            -0.0,
        ),
    )
    return RolloutGroup(index, version, Prompt("a/b 1", np.array([9], np.int32), "", "4\\2"), rollouts, np.pi)


def test_every_field_comes_back_bit_for_bit(tmp_path):
    log = RolloutLog(tmp_path)
    groups = [group(2, 3), odd_group(5, 3), group(0, 3, is_usable=False)]
    log.append(groups[:2])
    log.append(groups[2:])
    read = RolloutLog(tmp_path).read(3)
    assert [item.index for item in read] == [0, 2, 5]
    assert [bits(item) for item in read] == [bits(groups[2]), bits(groups[0]), bits(groups[1])]
    assert len(read[0].rollouts) == 2
    assert not read[0].usable


def test_rollouts_keep_their_order_also_beyond_ten(tmp_path):
    rng = np.random.default_rng(0)
    whole = RolloutGroup(0, 0, prompt(0), tuple(rollout(rng, 1 + i) for i in range(23)), 0.5)
    RolloutLog(tmp_path).append([whole])
    assert bits(RolloutLog(tmp_path).read(0)[0]) == bits(whole)


def test_versions_are_apart_and_an_unknown_one_is_empty(tmp_path):
    log = RolloutLog(tmp_path)
    for version in (0, 10, 2):
        log.append([group(0, version)])
    assert log.versions() == [0, 2, 10]
    assert [item.policy_version for item in log.read(10)] == [10]
    assert log.read(7) == []
    assert RolloutLog(tmp_path / "nothing").versions() == []


def test_a_part_holds_one_version_only(tmp_path):
    with pytest.raises(ValueError, match="too many values"):
        RolloutLog(tmp_path).append([group(0, 0), group(1, 1)])


def test_parts_go_on_after_a_restart_and_overwrite_nothing(tmp_path):
    first = RolloutLog(tmp_path)
    paths = [first.append([group(i)]) for i in range(2)]
    second = RolloutLog(tmp_path)
    paths += [second.append([group(i)]) for i in range(2, 4)]
    assert [path.name for path in paths] == [f"part-{i:06d}.parquet" for i in range(4)]
    assert [item.index for item in RolloutLog(tmp_path).read(0)] == [0, 1, 2, 3]


def test_a_torn_temporary_file_is_ignored(tmp_path):
    log = RolloutLog(tmp_path)
    whole = log.append([group(0)])
    torn = whole.parent / ".part-000001.parquet.0123abcd.tmp"
    torn.write_bytes(whole.read_bytes()[:100])
    again = RolloutLog(tmp_path)
    assert [item.index for item in again.read(0)] == [0]
    again.append([group(1)])
    assert [item.index for item in again.read(0)] == [0, 1]


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_an_unreadable_file_is_named(tmp_path, damage):
    log = RolloutLog(tmp_path)
    log.append([group(0)])
    path = log.append([group(i) for i in range(1, 20)])
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[4:60] = bytes(byte ^ 0xFF for byte in content[4:60])
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "flipped": content}[damage])
    with pytest.raises(ValueError, match=r"000000/part-000001\.parquet: is not a readable Parquet file"):
        log.read(0)


def test_a_foreign_file_is_named(tmp_path):
    path = RolloutLog(tmp_path).append([group(0)])
    pq.write_table(pa.table({"text": ["hello"]}), path)
    with pytest.raises(
        ValueError, match=r"part-000000\.parquet: is no rollout log: it has no column group_id,.* it has \['text'\]"
    ):
        RolloutLog(tmp_path).read(0)


def test_a_group_in_two_files_is_an_error(tmp_path):
    log = RolloutLog(tmp_path)
    log.append([group(0), group(4)])
    log.append([group(4)])
    with pytest.raises(ValueError, match="000000: group 000000-00000004 is in the rollout log twice"):
        log.read(0)


def test_a_group_twice_in_one_file_is_an_error_and_not_a_larger_group(tmp_path):
    log = RolloutLog(tmp_path)
    log.append([group(4), group(4)])
    with pytest.raises(ValueError, match=r"part-000000\.parquet: group 000000-00000004 has rollouts \[0, 0, 1, 1\]"):
        log.read(0)


def test_a_group_that_lacks_a_rollout_is_an_error(tmp_path):
    path = RolloutLog(tmp_path).append([group(4)])
    pq.write_table(schema.to_table([group(4)]).slice(1), path)
    with pytest.raises(ValueError, match=r"part-000000\.parquet: group 000000-00000004 has rollouts \[1\]"):
        RolloutLog(tmp_path).read(0)


def test_absent_numbers_are_null_in_the_file_and_logprobs_are_not(tmp_path):
    path = RolloutLog(tmp_path).append([odd_group(), dataclasses.replace(group(1, 3, is_usable=False))])
    rows = pq.ParquetFile(path).read().to_pylist()
    assert [row["reward"] for row in rows[1:2] + rows[3:]] == [None] * 3
    assert [row["value"] for row in rows[3:]] == [None] * 2
    assert rows[0]["advantage"] is None
    assert math.isnan(rows[0]["logprobs"][0])


LAST, OTHER = "000000-00000077", "000001-00000000"


def batch(*names):
    return {name: f"digest of {name}" for name in names}


def record_steps(path, steps, **options):
    record = BatchRecord(path, **options)
    for step in steps:
        record.record(step, 0, batch(f"000000-{step:08d}", LAST))
    return record


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_batch_record_replays_the_steps_before_a_restart_and_goes_on(tmp_path):
    path = tmp_path / "batches.jsonl"
    record_steps(path, [1, 2, 3])
    before = path.read_text()
    record_steps(path, [2, 3, 4])
    assert path.read_text().startswith(before)
    assert steps_in(path) == [1, 2, 3, 4]
    names = ["000000-00000001", LAST]
    digests = [f"digest of {name}" for name in names]
    first = {"step": 1, "policy_version": 0, "groups": names, "digests": digests}
    assert json.loads(before.splitlines()[0]) == first


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        (batch("000000-00000008", "000000-00000009"), "consumed groups .* before the restart and .* now"),
        (batch(LAST, "000000-00000002"), "consumed groups"),
        (batch("000000-00000002"), "consumed groups"),
        ({"000000-00000002": "digest of 000000-00000002", LAST: "other"}, f"consumed another group {LAST} before"),
    ],
)
def test_a_changed_batch_is_refused(tmp_path, groups, told):
    path = tmp_path / "batches.jsonl"
    record_steps(path, [1, 2])
    with pytest.raises(ValueError, match=rf"batches\.jsonl: step 2 {told}"):
        BatchRecord(path).record(2, 0, groups)
    assert steps_in(path) == [1, 2]


def test_steps_after_one_can_be_deleted(tmp_path):
    path = tmp_path / "batches.jsonl"
    record_steps(path, [1, 2, 3, 4])
    record = BatchRecord(path, delete_after=2)
    assert steps_in(path) == [1, 2]
    record.record(3, 1, batch(OTHER))
    with pytest.raises(ValueError, match="step 2"):
        record.record(2, 1, batch(OTHER))
    assert steps_in(path) == [1, 2, 3]


@pytest.mark.parametrize("kept_characters", [1, 20, 60])
def test_a_torn_last_line_is_removed_and_recorded_again(tmp_path, kept_characters):
    path = tmp_path / "batches.jsonl"
    record_steps(path, [1, 2])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:kept_characters])
    record = BatchRecord(path)
    assert steps_in(path) == [1]
    record.record(2, 0, batch(OTHER))
    assert steps_in(path) == [1, 2]
    assert json.loads(path.read_text().splitlines()[1])["groups"] == [OTHER]


def test_a_damaged_line_names_the_file_and_the_line(tmp_path):
    path = tmp_path / "batches.jsonl"
    record_steps(path, [1, 2, 3])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "\x00\x00\n" + lines[2])
    with pytest.raises(ValueError, match=r"batches\.jsonl: line 2"):
        BatchRecord(path)
