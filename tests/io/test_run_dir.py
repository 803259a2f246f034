"""A run directory belongs to one config."""

import os
import pathlib

import pytest

from oapl_jax.build.checks import CHECKS
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.io.run_dir import identity, open_run

RAW = {
    "run": {"steps": 10},
    "model": {"config": "model.json", "tokenizer": "characters"},
    "data": {"task": "chain", "max_prompt_tokens": 12},
    "sampler": {"group_size": 4, "max_response_tokens": 6},
    "objective": {},
    "learner": {"batch_rollouts": 16},
}


def make_config(directory, **sections):
    raw = {name: {**RAW.get(name, {}), **sections.get(name, {})} for name in RAW | sections}
    raw["run"]["dir"] = str(directory)
    return config_file.validate(TrainConfig, raw, "test", CHECKS)


def test_a_new_directory_is_made_and_holds_the_resolved_config(tmp_path):
    config = make_config(tmp_path / "a" / "b")
    directory = open_run(config, TrainConfig)
    assert directory == tmp_path / "a" / "b"
    assert config_file.load(TrainConfig, directory / "config.yaml") == config


def test_the_same_config_opens_it_again(tmp_path):
    for _ in range(3):
        assert open_run(make_config(tmp_path), TrainConfig) == tmp_path


def test_another_config_is_refused_naming_every_key_that_differs(tmp_path):
    open_run(make_config(tmp_path), TrainConfig)
    before = (tmp_path / "config.yaml").read_text()
    other = make_config(tmp_path, run={"steps": 20}, learner={"batch_rollouts": 32}, objective={"beta2": 0.5})
    with pytest.raises(ValueError, match="belongs to a run of another config") as caught:
        open_run(other, TrainConfig)
    differing = [line.strip() for line in str(caught.value).splitlines() if "->" in line]
    assert differing == ["run.steps: 10 -> 20", "objective.beta2: 0.001 -> 0.5", "learner.batch_rollouts: 16 -> 32"]
    assert "run.allow_config_change=true" in str(caught.value)
    assert (tmp_path / "config.yaml").read_text() == before


def test_a_change_that_is_allowed_is_told_and_saved(tmp_path):
    open_run(make_config(tmp_path), TrainConfig)
    other = make_config(tmp_path, run={"allow_config_change": True}, learner={"learning_rate": 0.5})
    assert open_run(other, TrainConfig) == tmp_path
    assert config_file.load(TrainConfig, tmp_path / "config.yaml") == other
    with pytest.raises(ValueError, match=r"learner\.learning_rate: 0\.5 -> 1e-06"):
        open_run(make_config(tmp_path), TrainConfig)


def test_leave_to_change_is_itself_no_change(tmp_path):
    open_run(make_config(tmp_path), TrainConfig)
    allowing = make_config(tmp_path, run={"allow_config_change": True})
    assert open_run(allowing, TrainConfig) == tmp_path
    assert identity(allowing) == identity(make_config(tmp_path))
    assert identity(allowing) != identity(make_config(tmp_path, run={"steps": 20}))


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run\.dir='.*/file/run': cannot be made"):
        open_run(make_config(tmp_path / "file" / "run"), TrainConfig)


@pytest.mark.skipif(not pathlib.Path("/proc").is_dir(), reason="needs a folder where nobody may write, not even root")
def test_a_directory_that_cannot_be_written_is_named():
    with pytest.raises(ValueError, match=r"run\.dir='/proc': cannot be written"):
        open_run(make_config("/proc"), TrainConfig)


def test_a_crash_while_the_config_is_saved_leaves_the_one_before(tmp_path):
    config = make_config(tmp_path)
    open_run(config, TrainConfig)
    descriptor = os.open(tmp_path / "config.yaml", os.O_RDONLY)  # the file of before, whatever its name becomes
    try:
        before = os.read(descriptor, 100_000)
        open_run(make_config(tmp_path, run={"steps": 20, "allow_config_change": True}), TrainConfig)
        os.lseek(descriptor, 0, os.SEEK_SET)
        assert os.read(descriptor, 100_000) == before, "it is replaced, not written over"
    finally:
        os.close(descriptor)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_saved_config_that_a_crash_tore_is_named(tmp_path):
    open_run(make_config(tmp_path), TrainConfig)
    saved = tmp_path / "config.yaml"
    saved.write_text(saved.read_text()[:50])
    with pytest.raises(ValueError, match=r"config\.yaml"):
        open_run(make_config(tmp_path), TrainConfig)
