"""The audit finds what it says it proves, and names the place."""

import dataclasses
import json

import numpy as np
import pytest

from oapl_jax.cli import audit as command
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.data.tokenizer import CharacterTokenizer
from oapl_jax.io import console, run_dir
from oapl_jax.rollouts.audit import audit
from oapl_jax.rollouts.log import BatchRecord, RolloutLog, digest
from oapl_jax.types import RunError
from rollouts.groups import sound

CONFIG = {
    "run": {"dir": "unused", "steps": 4},
    "model": {"config": "model.json", "tokenizer": "characters"},
    "data": {"task": "chain"},
    "sampler": {"group_size": 2, "max_response_tokens": 6},
    "learner": {"batch_rollouts": 4},
    "window": {"sync_every": 2},
    "evaluation": {"every": 0},
}


@pytest.fixture
def run(tmp_path):
    """Four steps in two windows; group 1 of the second is not usable and was passed over."""
    run_dir.save_config(tmp_path, config_file.validate(TrainConfig, CONFIG, "test"))
    log, record = RolloutLog(tmp_path / "rollouts"), BatchRecord(tmp_path / "batches.jsonl")
    for version, indices in ((0, [0, 1, 2, 3]), (1, [0, 2, 3, 4])):
        groups = [sound(index, version, is_usable=(version, index) != (1, 1)) for index in range(5)]
        log.append(groups)
        for half in range(2):
            batch = [groups[index] for index in indices[2 * half : 2 * half + 2]]
            record.record(2 * version + half + 1, version, {group.id: digest(group) for group in batch})
    rows = [{"step": step, "window/version": (step - 1) // 2, "window/lag": (step - 1) % 2} for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def edit_line(path, number, **values):
    lines = path.read_text().splitlines()
    lines[number - 1] = json.dumps({**json.loads(lines[number - 1]), **values})
    path.write_text("\n".join(lines) + "\n")


def rewrite(run, version, groups, *, is_recorded=True):
    """Other groups in the log, and in the record of what was trained on."""
    (path,) = (run / "rollouts" / f"{version:06d}").glob("*.parquet")
    path.unlink()
    RolloutLog(run / "rollouts").append(groups)
    digests = {group.id: digest(group) for group in groups}
    for number, line in enumerate(map(json.loads, (run / "batches.jsonl").read_text().splitlines()), start=1):
        if is_recorded and line["policy_version"] == version:
            edit_line(run / "batches.jsonl", number, digests=[digests[name] for name in line["groups"]])


def with_rollout(item, **values):
    """The group with its first rollout changed."""
    first, *rest = item.rollouts
    changed = dataclasses.replace(first, rollout=dataclasses.replace(first.rollout, **values))
    return dataclasses.replace(item, rollouts=(changed, *rest))


def test_a_sound_run_is_proved(run, capsys):
    assert console.run(command.main, [str(run)]) == console.ExitCode.DONE
    assert capsys.readouterr().out == "4 steps, 2 windows, 8 groups, 16 rollouts: all as recorded\n"


def test_the_tokenizer_of_a_warm_start_is_that_of_the_runs_own_export(run):
    model = {"warm_start": "chain_sft.yaml"}
    run_dir.save_config(run, config_file.validate(TrainConfig, CONFIG | {"model": model}, "test"))
    unknown = "; not checked: token ids and the ends of responses, whose tokenizer cannot be read"
    assert audit(run).endswith(f"all as recorded{unknown}")
    (run / run_dir.EXPORT_FOLDER).mkdir()
    CharacterTokenizer().save(run / run_dir.EXPORT_FOLDER)
    assert audit(run).endswith("all as recorded")


def test_a_run_that_was_killed_is_proved_as_far_as_it_came(run):
    with (run / "batches.jsonl").open("a") as file:
        file.write('{"step": 5, "policy_ver')
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text()[:-30])
    assert audit(run).startswith("4 steps")


@pytest.mark.parametrize(
    ("line", "values", "message"),
    [
        (2, {"groups": ["000000-00000001", "000000-00000002"]}, "group 000000-00000001 was trained on 2 times"),
        (2, {"groups": ["000000-00000002", "000000-00000002"]}, "line 2: a group is in the batch twice"),
        (2, {"groups": ["000000-00000002"]}, "line 2: 1 groups; a batch has 2"),
        (
            2,
            {"groups": ["000000-00000002", "000000-00000009"]},
            "line 2: group 000000-00000009 is not in rollouts/000000",
        ),
        (
            2,
            {"groups": ["000000-00000003", "000000-00000002"]},
            "line 2: the groups are not in the order of their index",
        ),
        (3, {"groups": ["000001-00000000", "000001-00000001"]}, "group 000001-00000001: has fewer than two usable"),
        (
            4,
            {"groups": ["000001-00000003", "000000-00000003"]},
            "line 4: group 000000-00000003 is not in rollouts/000001",
        ),
        (3, {"policy_version": 0}, "line 3: step 3 lags 2"),
        (2, {"policy_version": 1}, "line 2: step 2 is of version 1, 1 steps after the sync to 0"),
        (3, {"step": 4}, "line 3: step 4 follows step 2"),
    ],
)
def test_a_wrong_record_is_found(run, line, values, message, capsys):
    if "groups" in values:
        found = map(json.loads, (run / "batches.jsonl").read_text().splitlines())
        known = {name: digest for row in found for name, digest in zip(row["groups"], row["digests"], strict=True)}
        values = {**values, "digests": [known.get(name, "") for name in values["groups"]]}
    edit_line(run / "batches.jsonl", line, **values)
    assert console.run(command.main, [str(run)]) == console.ExitCode.FAILED
    assert message in capsys.readouterr().err


def test_groups_of_the_version_before_are_allowed_as_far_as_the_config_says(run):
    """The second window begins with a group that the first one left, and the third with one of the first."""
    config = config_file.validate(TrainConfig, CONFIG | {"window": {"sync_every": 2, "max_version_lag": 1}}, "test")
    run_dir.save_config(run, config)
    known = {item.id: digest(item) for version in (0, 1) for item in RolloutLog(run / "rollouts").read(version)}
    batch = ["000000-00000004", "000001-00000000"]
    edit_line(run / "batches.jsonl", 3, groups=batch, digests=[known[name] for name in batch])
    assert audit(run).startswith("4 steps, 2 windows, 8 groups")
    RolloutLog(run / "rollouts").append([sound(index, 2) for index in range(5)])
    for number in (3, 4):
        edit_line(run / "batches.jsonl", number, policy_version=2)
    with pytest.raises(RunError, match="group 000000-00000004 is not in rollouts/000002 or rollouts/000001"):
        audit(run)


def test_metrics_of_another_version_or_lag_are_found(run):
    edit_line(run / "metrics.jsonl", 3, **{"window/version": 0})
    with pytest.raises(RunError, match="step 3: is of version 0, its batch of 1"):
        audit(run)
    edit_line(run / "metrics.jsonl", 3, **{"window/version": 1, "window/lag": 2})
    with pytest.raises(RunError, match="step 3: lags 2"):
        audit(run)


def with_advantage(item, advantage):
    first, *rest = item.rollouts
    return dataclasses.replace(item, rollouts=(dataclasses.replace(first, advantage=advantage), *rest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda g: with_rollout(g, logprobs=g.rollouts[0].rollout.logprobs * np.nan),
            "0: a log-probability is not fin",
        ),
        (lambda g: with_rollout(g, logprobs=np.float32([50, -1])), "rollout 0: a log-probability is 50, above 0"),
        (
            lambda g: with_rollout(g, token_ids=np.int32([-7, 1])),
            "rollout 0: token_ids has -7; the vocabulary has ids 0",
        ),
        (
            lambda g: with_rollout(g, token_ids=np.int32([18, 1])),
            "rollout 0: token_ids has 18; the vocabulary has ids 0",
        ),
        (lambda g: with_advantage(g, 1e30), r"its advantages \[1e\+30, .* the rewards give"),
        (lambda g: dataclasses.replace(g, rollouts=g.rollouts[:1]), "has 1 rollouts of 2"),
    ],
)
def test_a_wrong_group_is_found(run, damage, message):
    groups = [sound(index) for index in range(5)]
    rewrite(run, 0, [*groups[:2], damage(groups[2]), *groups[3:]])
    with pytest.raises(RunError, match=f"group 000000-00000002.*{message}"):
        audit(run)
    rewrite(run, 0, groups)
    audit(run)


def test_a_group_that_took_the_place_of_one_that_was_trained_on_is_found(run):
    other = dataclasses.replace(sound(7), index=2)
    rewrite(run, 0, [*(sound(index) for index in (0, 1)), other, sound(3), sound(4)], is_recorded=False)
    with pytest.raises(RunError, match="group 000000-00000002: is not the one that was trained on"):
        audit(run)


def test_a_damaged_file_that_no_batch_needs_is_said(run):
    (run / "rollouts" / "000001" / "part-000099.parquet").write_bytes(b"PAR1 torn")
    assert audit(run).endswith("; damaged files, of which nothing was trained on: 1")


def test_a_damaged_file_and_a_folder_that_is_no_run(run, tmp_path, capsys):
    (path,) = (run / "rollouts" / "000001").glob("*.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RunError, match=r"part-000000\.parquet: is not a readable Parquet file"):
        audit(run)
    assert console.run(command.main, [str(tmp_path / "nothing")]) == console.ExitCode.USAGE
    assert "is no run directory: it has no run.json" in capsys.readouterr().err
