"""Offline runs: rounds of finished data, made here or elsewhere."""

import dataclasses
import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oapl_jax import train
from oapl_jax.config.config_file import ConfigError
from oapl_jax.objectives import oapl
from oapl_jax.rollouts import published
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.types import FinishReason, Grade, Rollout, Verdict
from runs import assert_same_run, finish, make_config, read_lines, signal_after, start, write_config

pytestmark = pytest.mark.slow

ROUND = {"prompts": 14, "epochs": 2, "filter": {"min_correct": 1}}


def offline_config(run_dir, rounds=(ROUND, ROUND), *, offline=None, **sections):
    sections = {
        "run": {"steps": 100},
        "evaluation": {"every": 0, "prompts": 4, "samples": 4, "final_samples": 4},
    } | sections
    return make_config(
        run_dir,
        mode="offline",
        offline={"rounds": list(rounds), **(offline or {})},
        window={"sync_every": 50},
        **sections,
    )


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """Two rounds that nothing disturbs."""
    directory = tmp_path_factory.mktemp("offline") / "run"
    return directory, train.run(offline_config(directory))


def test_two_rounds_of_two_epochs(calm):
    directory, summary = calm
    log, batches = RolloutLog(directory / "rollouts"), read_lines(directory / "batches.jsonl")
    assert log.versions() == [0, 1]
    for version in (0, 1):
        groups = log.read(version)
        assert [group.index for group in groups] == list(range(14))
        right = [g.id for g in groups if any(item.grade.verdict is Verdict.CORRECT for item in g.rollouts)]
        steps = [batch for batch in batches if batch["policy_version"] == version]
        per_epoch = len(right) // 4
        assert len(steps) == 2 * per_epoch
        first, second = (
            [i for batch in part for i in batch["groups"]] for part in (steps[:per_epoch], steps[per_epoch:])
        )
        assert first == right[: 4 * per_epoch], "the first pass goes by index, without groups that the filter left out"
        assert sorted(second) == sorted(first), "the second takes the same"
        assert second != first, "in another order"
        record = json.loads((directory / f"rounds/{version:06d}.json").read_text())
        assert record["filter"]["kept"] == len(right)
    prompts = [[group.prompt.id for group in log.read(version)] for version in (0, 1)]
    assert prompts[0] + prompts[1] == [f"chain/train/{i}" for i in range(28)], "each round has prompts of its own"
    assert [(epoch["round"], epoch["epoch"]) for epoch in summary["epochs"]] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    for epoch in summary["epochs"]:
        assert (pathlib.Path(epoch["folder"]) / "model.safetensors").is_file()
    assert summary["best"]["pass@1"] == max(epoch["pass@1"] for epoch in summary["epochs"])
    rows = [row for row in read_lines(directory / "metrics.jsonl") if row["step"]]
    assert [row["step"] for row in rows] == [batch["step"] for batch in batches]
    assert [row["step"] for row in rows if "evaluation/pass@1" in row] == [epoch["step"] for epoch in summary["epochs"]]


def test_a_killed_offline_run_is_the_calm_one(calm, tmp_path):
    directory = tmp_path / "run"
    path = write_config(tmp_path / "config.yaml", offline_config(directory))
    process = start(path)
    assert signal_after(process, directory, calm[1]["epochs"][1]["step"] - 1), "it was over too soon"
    finish(process)
    train.run(offline_config(directory))
    assert_same_run(calm[0], directory)


def test_data_from_outside_are_cut_checked_and_scored_once(calm, tmp_path):
    """The calm run's first round without its log-probabilities, every second response too long, one row without a reward."""
    source, groups = RolloutLog(calm[0] / "rollouts").read(0), []
    for group in source:
        rollouts = list(group.rollouts)
        for i in range(0, 8, 2):
            tokens = np.resize([5, *(token for token in rollouts[i].rollout.token_ids if token != 1)], 9).astype(
                np.int32
            )
            tokens[-1] = 1  # the stop; the limit is 6
            rollout = Rollout(tokens, np.full(9, -1.0, np.float32), FinishReason.STOP)
            rollouts[i] = dataclasses.replace(rollouts[i], rollout=rollout, grade=Grade(Verdict.CORRECT, 1.0))
        rollouts = [dataclasses.replace(item, extra=f'{{"number": {i}}}') for i, item in enumerate(rollouts)]
        groups.append(dataclasses.replace(group, rollouts=tuple(rollouts)))
    published.write(tmp_path / "data.parquet", groups)
    table = pq.read_table(tmp_path / "data.parquet").drop_columns(["response_logprobs"])
    rewards = pa.array([None, *table.column("precomputed_reward").to_pylist()[1:]], pa.float64())
    table = table.set_column(table.schema.get_field_index("precomputed_reward"), "precomputed_reward", rewards)
    pq.write_table(table, tmp_path / "data.parquet")

    options = {"overlong": "truncate", "bad_rows": "drop"}
    config = offline_config(tmp_path / "run", [{"log": str(tmp_path / "data.parquet")}], offline=options)
    summary = train.run(config)
    assert summary["steps"] == 3, "14 groups make 3 batches of 4"
    record = json.loads((tmp_path / "run/rounds/000000.json").read_text())
    assert record["scored"] == 111
    assert record["bad_rows"] == {"no reward": 1, "unequal groups": 1, "truncated responses": 55}
    of_prompt = {group.prompt.id: group for group in source}
    trained = RolloutLog(tmp_path / "run/rollouts").read(0)
    assert [group.index for group in trained] == list(range(14))
    assert [g.prompt.id for g in trained] != [g.prompt.id for g in source], "in a random order"
    for group in trained:
        first = 8 - len(group.rollouts)  # one lost its first row
        assert [item.extra for item in group.rollouts] == [f'{{"number": {i}}}' for i in range(first, 8)]
        originals = list(of_prompt[group.prompt.id].rollouts)[first:]
        for item, original in zip(group.rollouts, originals, strict=True):
            if item.grade.detail == "truncated for training":
                assert len(item.rollout.token_ids) == 6
                assert (item.grade.reward, item.grade.verdict) == (0.0, Verdict.WRONG)
                assert item.rollout.finish_reason is FinishReason.LENGTH
            else:
                assert item.rollout.token_ids.tolist() == original.rollout.token_ids.tolist()
                np.testing.assert_allclose(item.rollout.logprobs, original.rollout.logprobs, atol=1e-4)
        rewards = np.array([item.grade.reward for item in group.rollouts])
        np.testing.assert_allclose([i.advantage for i in group.rollouts], oapl.advantages(rewards, 1.0), atol=1e-12)


def test_a_response_that_goes_on_after_its_stop_is_a_bad_row(calm, tmp_path):
    first, *rest = RolloutLog(calm[0] / "rollouts").read(0)
    rollout = Rollout(np.array([5, 1, 5, 1], np.int32), np.full(4, -1.0, np.float32), FinishReason.STOP)
    rollouts = (dataclasses.replace(first.rollouts[0], rollout=rollout), *first.rollouts[1:])
    RolloutLog(tmp_path / "data").append([dataclasses.replace(first, rollouts=rollouts), *rest])
    config = offline_config(tmp_path / "run", [{"log": str(tmp_path / "data")}])
    with pytest.raises(ValueError, match=r"goes on after its stop, token 2.*mend it, or set offline\.bad_rows=drop"):
        train.run(config)


def test_what_is_wrong_with_an_offline_config_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"offline\.rounds\.0\.prompts: how many"):
        offline_config(tmp_path / "run", [{}])
    with pytest.raises(ConfigError, match="mode=offline: the section offline is missing"):
        make_config(tmp_path / "run", mode="offline")
    with pytest.raises(ConfigError, match=r"window\.max_uses: has no effect with mode=offline"):
        make_config(
            tmp_path / "run", mode="offline", offline={"rounds": [ROUND]}, window={"sync_every": 50, "max_uses": 2}
        )
    missing = offline_config(tmp_path / "missing", [{"log": str(tmp_path / "none.parquet")}])
    with pytest.raises(ValueError, match=r"offline\.rounds\.0\.log=.*none\.parquet' does not exist"):
        train.run(missing)
    assert not (tmp_path / "missing" / "checkpoints" / "0").exists(), "before anything was computed"
