"""A run that is killed and started again is the run that was never interrupted, bit for bit."""

import json
import shutil
import signal

import numpy as np
import pytest

from oapl_jax import train
from oapl_jax.cli import commands
from oapl_jax.rollouts.audit import audit
from runs import assert_same_run, finish, make_config, read_lines, signal_after, start, weights, write_config

pytestmark = pytest.mark.slow


@pytest.fixture
def calm(finished):
    """The uninterrupted run."""
    return finished[0]


def test_killed_four_times_and_resumed(calm, tmp_path):
    """Before step 1, before the first checkpoint, in a later window between two checkpoints, near the end."""
    directory = tmp_path / "run"
    path = write_config(tmp_path / "config.yaml", make_config(directory))
    for step in (0, 2, 7, 9):
        process = start(path)
        assert signal_after(process, directory, step), f"the run was over before the kill at step {step}"
        finish(process)
    train.run(make_config(directory))
    assert_same_run(calm, directory)


@pytest.mark.parametrize(
    "window", [{"order": "ready", "max_uses": 2}, {"max_version_lag": 1, "sync_every": 2}], ids=["ready", "lag"]
)
def test_batches_that_depend_on_timing_are_replayed_from_the_log(tmp_path, window):
    """From the first checkpoint, in one process, with nothing of what came after it but log and record."""
    first, again = tmp_path / "first", tmp_path / "again"
    train.run(make_config(first, window=window, checkpoint={"keep": 9}))
    shutil.copytree(first, again)
    (again / "config.yaml").unlink()
    for path in (again / "checkpoints").iterdir():
        if path.name != "0":
            shutil.rmtree(path)
    (again / "metrics.jsonl").unlink()
    config = make_config(again, window=window, checkpoint={"keep": 9})
    train.run(config)
    for name, tensor in weights(first).items():
        np.testing.assert_array_equal(tensor, weights(again)[name], err_msg=name)
    batches = read_lines(first / "batches.jsonl")
    assert batches == read_lines(again / "batches.jsonl")
    if "max_version_lag" in window:
        assert "10 steps, 5 windows, 40 groups" in audit(again)
        versions = [[int(name.partition("-")[0]) for name in row["groups"]] for row in batches]
        previous = [
            sum(v < row["policy_version"] for v in of_batch) for of_batch, row in zip(versions, batches, strict=True)
        ]
        assert [row["window/previous_groups"] for row in read_lines(first / "metrics.jsonl")[1:]] == previous
        assert sum(previous) > 0


def test_sigterm_saves_and_exits_with_42(calm, tmp_path, capsys):
    directory = tmp_path / "run"
    path = write_config(tmp_path / "config.yaml", make_config(directory))
    process = start(path)
    assert signal_after(process, directory, 4, signal.SIGTERM)
    code, output = finish(process)
    assert code == 42, output
    assert "SIGTERM: saved at step" in output
    saved = max(int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit())
    assert saved == read_lines(directory / "metrics.jsonl")[-1]["step"], "saved at the step that was just done"
    assert commands.main(["train", "--config", str(path)]) == 0
    assert f"resumed at step {saved}" in capsys.readouterr().out
    assert_same_run(calm, directory)


def test_damaged_checkpoint_falls_back_to_the_one_before(calm, tmp_path, capsys):
    """A finished run whose last checkpoint is damaged goes back to step 9 and ends the same."""
    directory = tmp_path / "run"
    shutil.copytree(calm, directory)
    (directory / "config.yaml").unlink()
    path = write_config(tmp_path / "config.yaml", make_config(directory))
    files = [file for file in (directory / "checkpoints" / "10").rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert commands.main(["train", "--config", str(path)]) == 0
    output = capsys.readouterr().out
    assert "checkpoint 10 cannot be loaded" in output
    assert "resumed at step 9" in output
    assert_same_run(calm, directory)


def test_another_config_is_refused_and_allowed_when_told(calm, tmp_path, capsys):
    directory = tmp_path / "run"
    shutil.copytree(calm, directory)
    (directory / "config.yaml").unlink()
    first = write_config(directory / "config.yaml", make_config(directory))
    changed = write_config(tmp_path / "config.yaml", make_config(directory, learner={"learning_rate": 0.0}))
    assert commands.main(["train", "--config", str(changed)]) == 2
    said = capsys.readouterr().err
    assert "learner.learning_rate: 0.001 -> 0.0" in said
    assert "Traceback" not in said
    assert first.exists()

    words = ["train", "--config", str(changed), "run.allow_config_change=true", "run.steps=14"]
    assert commands.main(words) == 0
    batches = read_lines(directory / "batches.jsonl")
    versions = {row["step"]: row["policy_version"] for row in batches}
    assert sorted(versions) == list(range(1, 15))
    assert versions[11] > versions[10], "groups of the old config must not meet the new one"
    assert json.loads((directory / "summary.json").read_text())["steps"] == 14
