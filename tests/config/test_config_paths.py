"""Configs by name, and the files that they name: from an empty folder, as after ``pip install``."""

import pathlib

import pytest

from oapl_jax.build.checks import CHECKS
from oapl_jax.cli import commands
from oapl_jax.config import config_file
from oapl_jax.config.commands import SftConfig, TrainConfig
from oapl_jax.io import run_dir
from oapl_jax.io.console import ExitCode

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
run: {dir: runs/own, steps: 1}
model: {warm_start: start.yaml}
data: {path: rows/train.jsonl}
reward: {functions: {"verdicts:score": 1.0}, folder: rewards}
sampler: {max_response_tokens: 8}
evaluation: {path: test.jsonl}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a config and its files; the working directory is another one, and empty."""
    folder, empty = tmp_path / "project", tmp_path / "empty"
    for name in ("rows", "rewards", "runs"):
        (folder / name).mkdir(parents=True)
    empty.mkdir()
    (folder / "run.yaml").write_text(CONFIG)
    for name in ("start.yaml", "rows/train.jsonl"):
        (folder / name).touch()
    monkeypatch.chdir(empty)
    return folder


def test_a_path_is_looked_for_beside_the_file_that_names_it(project):
    config = config_file.load(TrainConfig, project / "run.yaml", checks=CHECKS)
    assert config.model.warm_start == str(project / "start.yaml")
    assert config.data.path == str(project / "rows/train.jsonl")
    assert config.reward.folder == str(project / "rewards")
    assert config.evaluation.path == "test.jsonl", "it is not there, so it stays as it is"
    assert config.run.dir == "runs/own", "what is written belongs to the working directory"


def test_a_path_of_an_override_is_read_from_the_working_directory(project):
    words = ["data.path=rows/train.jsonl", "evaluation.path=run.yaml"]
    config = config_file.load(TrainConfig, project / "run.yaml", words, CHECKS)
    assert (config.data.path, config.evaluation.path) == ("rows/train.jsonl", "run.yaml")


def test_a_path_in_the_working_directory_is_the_same_however_the_file_is_named(project, monkeypatch):
    monkeypatch.chdir(project)
    found = [config_file.load(TrainConfig, path, checks=CHECKS) for path in ("run.yaml", project / "run.yaml")]
    assert [config.data.path for config in found] == ["rows/train.jsonl"] * 2


def test_a_saved_config_means_what_it_meant_to_its_run(project):
    """Its run directory may have a folder of the same name as an input that lies elsewhere."""
    run = project / "saved"
    (run / "rollouts").mkdir(parents=True)
    words = [f"run.dir={run}", "data.path=rollouts"]
    config = config_file.load(TrainConfig, project / "run.yaml", words, CHECKS)
    run_dir.open_run(config)
    assert run_dir.check_run(config)
    assert run_dir.read_config(run, TrainConfig).data.path == "rollouts"


def test_a_shipped_config_is_found_by_its_name_with_all_that_it_names(project):
    config = config_file.load(TrainConfig, "quickstart", checks=CHECKS)
    assert config.run.dir == "runs/quickstart"
    start = config_file.load(SftConfig, str(config.model.warm_start), checks=CHECKS)
    assert pathlib.Path(str(start.model.config)) == ROOT / "configs/toy_qwen3.json"


def test_a_file_comes_before_a_shipped_config_of_its_name(project):
    pathlib.Path("quickstart").write_text((project / "run.yaml").read_text())
    assert config_file.load(TrainConfig, "quickstart", checks=CHECKS).run.dir == "runs/own"


def test_an_unknown_name_is_answered_with_the_nearest(project, capsys):
    assert commands.main(["train", "--config", "quickstrat"]) == ExitCode.USAGE
    assert "did you mean 'quickstart'?" in capsys.readouterr().err
