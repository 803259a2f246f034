"""Values that a config takes from the environment are in memory only."""

import pathlib

import pytest

from oapl_jax.build.checks import CHECKS
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.config.config_file import ConfigError
from oapl_jax.io import console, run_dir
from test_schema import DATASET

SECRET = "hf_0123456789"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads the config with these lines and overrides, which take values from the environment."""
    monkeypatch.setenv("SECRET", SECRET)
    monkeypatch.setenv("STEPS", "12")

    def load_config(text="", *overrides):
        path = tmp_path / "run.yaml"
        path.write_text(DATASET.replace("runs/x", str(tmp_path / "run")) + text)
        return config_file.load(TrainConfig, path, list(overrides), CHECKS)

    return load_config


PLACES = {
    "a value": ("reward: {functions: {code: 1.0}, python: '${oc.env:SECRET}'}", []),
    "a part of a value": ("reward: {functions: {code: 1.0}, python: 'a-${oc.env:SECRET}-b'}", []),
    "with a default": ("reward: {functions: {code: 1.0}, python: '${oc.env:SECRET,other}'}", []),
    "by another key": (
        "reward: {functions: {code: 1.0}, python: '${oc.env:SECRET}', packages: ['${reward.python}']}",
        [],
    ),
    "in a list": ("reward: {functions: {code: 1.0}, packages: [numpy, '${oc.env:SECRET}']}", []),
    "decoded": ("reward: {functions: {code: 1.0}, python: '${oc.decode:${oc.env:SECRET}}'}", []),
    "an override": ("", ["run.project=${oc.env:SECRET}", "run.tracker=trackio"]),
}


@pytest.mark.parametrize(("text", "overrides"), PLACES.values(), ids=PLACES)
def test_a_saved_config_has_the_text_and_a_resumed_run_resolves_it_anew(load, monkeypatch, text, overrides):
    config = load(text, *overrides)
    assert SECRET in str(config)
    run = run_dir.open_run(config)
    saved = (run / "config.yaml").read_text()
    assert SECRET not in saved + run_dir.identity(config) + str(config_file.written(config))
    assert "${oc.env:SECRET" in saved
    assert run_dir.read_config(run, TrainConfig) == config
    monkeypatch.setenv("SECRET", "hf_9876543210")
    run_dir.open_run(load(text, *overrides))
    assert "hf_9876543210" in str(run_dir.read_config(run, TrainConfig))


def test_a_number_of_the_environment_is_a_number(load):
    config = load("", "run.steps=${oc.env:STEPS}")
    assert config.run.steps == 12
    assert config_file.written(config)["run"]["steps"] == "${oc.env:STEPS}"


def test_messages_do_not_have_the_value(load, capsys):
    with pytest.raises(ConfigError) as caught:
        load("mesh: {trainer: '${oc.env:SECRET}'}")
    assert SECRET not in str(caught.value)
    assert "'${oc.env:SECRET}'" in str(caught.value)

    def fail(argv):
        raise ValueError(f"no project {SECRET!r}")

    console.run(fail, [])
    assert capsys.readouterr().err == "error: no project '${oc.env:SECRET}'\n"


def test_a_variable_that_is_not_there_is_named_in_one_line(load):
    with pytest.raises(
        ConfigError, match=r"^config file '.*' cannot be read: .*Environment variable 'NOT_THERE' not found.*$"
    ):
        load("reward: {functions: {code: 1.0}, python: '${oc.env:NOT_THERE}'}")


def test_functions_of_the_user_are_looked_for_beside_the_config(load, tmp_path):
    config = load("reward: {functions: {'mine:f': 1.0}}")
    assert config.reward.folder == str(tmp_path)
    assert load().reward.folder is None
    moved = config.model_copy(update={"reward": config.reward.model_copy(update={"folder": "/elsewhere"})})
    assert run_dir.identity(moved) == run_dir.identity(config)
    assert pathlib.Path(load("reward: {functions: {'mine:f': 1.0}, folder: other}").reward.folder) == pathlib.Path(
        "other"
    )
