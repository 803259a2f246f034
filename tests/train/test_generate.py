"""python -m oapl_jax generate: what is killed, stopped or shared gives the same log as one quiet process."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

import runs
from oapl_jax.cli import generate
from oapl_jax.config import config_file
from oapl_jax.config.commands import GenerateConfig
from oapl_jax.config.config_file import ConfigError
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.types import Verdict

DEADLINE = 240.0


def make_config(run_dir, **sections) -> GenerateConfig:
    base = {
        "run": {"dir": str(run_dir), "seed": 3},
        "model": runs.BASE["model"],
        "data": runs.BASE["data"],
        "sampler": runs.BASE["sampler"],
        "generation": {"prompts": 24, "groups_per_file": 2},
        "mesh": runs.BASE["mesh"],
        "logging": {"progress": False},
    }
    raw = {name: {**values, **sections.pop(name, {})} for name, values in base.items()} | sections
    return config_file.validate(GenerateConfig, raw, source="tests")


def start(config: GenerateConfig, path: pathlib.Path) -> subprocess.Popen:
    """The command as a user gives it."""
    if not path.exists():
        path.write_text(config_file.to_yaml(config))
    command = [sys.executable, "-m", "oapl_jax", "generate", "--config", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(runs.ROOT)}
    return subprocess.Popen(command, cwd=runs.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def parts(run_dir) -> list[pathlib.Path]:
    return sorted((run_dir / "rollouts").glob("*/part-*.parquet"))


def wait_for_parts(run_dir, number: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + DEADLINE
    while len(parts(run_dir)) < number and process.poll() is None:
        assert time.monotonic() < end, f"only {len(parts(run_dir))} of {number} files"
        time.sleep(0.005)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, output.decode()
    return output.decode()


def bits(run_dir) -> list[tuple]:
    """Every rollout of the log, to the bit."""
    return [
        (
            group.id,
            group.prompt.id,
            item.text,
            item.grade.verdict,
            item.advantage,
            item.rollout.token_ids.tobytes(),
            item.rollout.logprobs.tobytes(),
            item.rollout.finish_reason,
        )
        for group in RolloutLog(run_dir / "rollouts").read(0)
        for item in group.rollouts
    ]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A run that nothing disturbs."""
    directory = tmp_path_factory.mktemp("generate") / "quiet"
    summary = generate.run(make_quiet_config(directory))
    return directory, summary


def make_quiet_config(directory):
    published = {"prompts": 24, "published": str(directory.parent / "published.parquet")}
    return make_config(directory, filter={"min_correct": 1, "max_correct": 7}, generation=published)


@pytest.mark.slow
def test_every_prompt_has_its_group_and_the_summary_counts_them(quiet):
    directory, summary = quiet
    groups = RolloutLog(directory / "rollouts").read(0)
    assert [group.index for group in groups] == list(range(24))
    assert [group.prompt.id for group in groups] == [f"chain/train/{i}" for i in range(24)]
    assert {len(group.rollouts) for group in groups} == {8}
    assert len(parts(directory)) == 12
    correct = [sum(item.grade.verdict is Verdict.CORRECT for item in group.rollouts) for group in groups]
    assert summary["correct"] == pytest.approx(sum(correct) / (8 * 24))
    assert (summary["groups"], summary["rollouts"]) == (24, 192)
    filtered = summary["filter"]
    assert filtered["too_few_correct"] == correct.count(0) > 0
    assert filtered["kept"] + filtered["too_few_correct"] + filtered["too_many_correct"] == 24
    assert json.loads((directory / "summary.json").read_text()) == summary
    for group in groups:
        for item in group.rollouts:
            assert np.isfinite(item.rollout.logprobs).all()


@pytest.mark.slow
def test_the_same_command_again_does_nothing(quiet):
    directory, summary = quiet
    before = {path: path.stat().st_mtime_ns for path in parts(directory)}
    assert generate.run(make_quiet_config(directory)) == summary
    assert {path: path.stat().st_mtime_ns for path in parts(directory)} == before


@pytest.mark.slow
def test_what_the_filter_leaves_is_published(quiet):
    directory, summary = quiet
    rows = pq.read_table(directory.parent / "published.parquet").to_pylist()
    assert len(rows) == 8 * summary["filter"]["kept"] > 0
    assert all(1 <= sum(row["response_rewards"]) <= 7 for row in rows)
    logged = {
        (group.index, i): item
        for group in RolloutLog(directory / "rollouts").read(0)
        for i, item in enumerate(group.rollouts)
    }
    for row in rows:
        item = logged[row["extra_info"]["index"], row["extra_info"]["rollout_index"]]
        assert row["response_token_ids"] == item.rollout.token_ids.tolist()
        assert (row["response"], row["precomputed_reward"]) == (item.text, item.grade.reward)
    file = pq.ParquetFile(parts(directory)[0])
    assert json.loads(file.schema_arrow.metadata[b"oapl_jax.sampling"])["temperature"] == 1.0


@pytest.mark.slow
def test_three_processes_of_which_one_is_killed_share_the_work(quiet, tmp_path):
    config, path = make_config(tmp_path / "shared", generation={"prompts": 400}), tmp_path / "config.yaml"
    processes = [start(config, path) for _ in range(3)]
    wait_for_parts(tmp_path / "shared", 10, processes[0])
    processes[0].kill()
    processes[0].communicate()
    assert len(parts(tmp_path / "shared")) < 200, "the work was over before the kill: make it larger"
    for process in processes[1:]:
        assert "400 groups, 3,200 responses" in finish(process)
    groups = RolloutLog(tmp_path / "shared" / "rollouts").read(0)  # refuses a group that is there twice
    assert [group.index for group in groups] == list(range(400))
    assert bits(tmp_path / "shared")[:192] == bits(quiet[0]), "the same responses whoever draws them"


@pytest.mark.slow
def test_a_generation_that_is_killed_twice_loses_and_doubles_nothing(quiet, tmp_path):
    directory, rng = tmp_path / "killed", np.random.default_rng(0)
    config, path = make_config(directory, generation={"prompts": 400}), tmp_path / "config.yaml"
    for kill_at in sorted(rng.choice(np.arange(1, 190), 2, replace=False)):
        process = start(config, path)
        wait_for_parts(directory, kill_at, process)
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the work was over before the kill"
    generate.run(config)
    assert [group.index for group in RolloutLog(directory / "rollouts").read(0)] == list(range(400))
    assert bits(directory)[:192] == bits(quiet[0])


@pytest.mark.slow
def test_sigterm_ends_it_with_42_and_frees_its_claims(tmp_path):
    config = make_config(tmp_path / "run", generation={"prompts": 4000})
    process = start(config, tmp_path / "config.yaml")
    wait_for_parts(tmp_path / "run", 2, process)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 42
    newest = {path.name.rpartition(".")[0]: path for path in sorted((tmp_path / "run/leases").glob("000000-*"))}
    assert newest
    assert all(json.loads(path.read_text())["is_released"] for path in newest.values())


@pytest.mark.slow
def test_a_run_directory_is_a_model_and_other_prompts_are_refused(finished, tmp_path):
    model = {"path": str(finished[0]), "tokenizer": "model"}
    small = {"prompts": 4}
    directory = tmp_path / "generated"
    summary = generate.run(make_config(directory, model=model, generation=small))
    assert summary is not None
    assert summary["groups"] == 4
    assert (directory / "policy" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="belongs to a run of another config"):
        generate.run(make_config(directory, model=model, generation={"prompts": 5}))
    with pytest.raises(ValueError, match="begun with other prompts"):
        generate.run(make_config(directory, model=model, generation={"prompts": 5}, run={"allow_config_change": True}))


def test_a_toy_task_needs_a_number_of_prompts(tmp_path):
    with pytest.raises(ConfigError, match=r"generation\.prompts: how many prompts"):
        make_config(tmp_path, generation={"prompts": None})
