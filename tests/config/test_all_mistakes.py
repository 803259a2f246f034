"""Mistakes of the schema come together, those across sections too; what only follows from another one is left out."""

import pathlib

import pytest

from oapl_jax.build.checks import CHECKS
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig

QUICKSTART = pathlib.Path(__file__).parents[2] / "configs/quickstart.yaml"


def mistakes(*overrides):
    with pytest.raises(config_file.ConfigError) as caught:
        config_file.load(TrainConfig, QUICKSTART, list(overrides), CHECKS)
    return caught.value


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["learner.learning_rat=1", "window.epochs=3"], ["learner.learning_rat", "window.epochs=3"]),
        (
            ["checkpoint.keep=0", "evaluation.path=a", "run.steps=x"],
            ["run.steps", "checkpoint.keep", "evaluation.path"],
        ),
        (["checkpoint.keep=0", "mode=offline"], ["checkpoint.keep", "mode=offline"]),
        (["data=null", "window.epoch=2", "checkpoint.keep=0"], ["data", "window.epoch", "checkpoint.keep"]),
        (["sampler=5", "checkpoint.keep=0"], ["sampler", "checkpoint.keep"]),
        # The batch cannot be judged by a group size that is not known.
        (["sampler.group_size=x", "learner.batch_rollouts=130"], ["sampler.group_size"]),
        (["data.task=chian", "evaluation.path=a"], ["data.task"]),
        (["checkpoint.keep_best=pass@1", "window.epochs=3"], ["window.epochs=3", "checkpoint.keep_best=pass@1"]),
        (["checkpoint.keep_best=evaluation/pass@3"], ["checkpoint.keep_best=evaluation/pass@3"]),
        (["checkpoint.patience=2"], ["checkpoint.patience"]),
        (["evaluation.prompts=0", "checkpoint.keep_best=evaluation/pass@1"], ["checkpoint.keep_best"]),
        (["checkpoint.keep_policies=3"], ["checkpoint.keep_policies"]),
        (["data.sets={a: {task: chain, path: x}}", "mode=offline"], ["data.sets.a", "mode=offline"]),
    ],
)
def test_all_mistakes_are_listed_and_no_consequences(overrides, keys):
    lines = mistakes(*overrides).lines
    assert len(lines) == len(keys), lines
    for key in keys:
        assert any(line.startswith(key) for line in lines), (key, lines)


def test_a_section_is_wrong_by_what_it_has_not_by_what_has_no_effect():
    error = mistakes("evaluation.path=a", "data.path=b", "window.epoch=2")
    assert error.wrong == {"data", "window"}  # data has a task and a path: which one is meant is not known


def test_the_rest_of_the_config_serves_further_checks():
    error = mistakes("learner.learning_rat=1", "mesh.trainer=fsdp=77")
    assert error.wrong == {"learner"}
    assert error.rest.mesh.trainer == "fsdp=77"
    assert error.rest.data.task == "chain"


@pytest.mark.parametrize("reward", ["5", "[1]", "{timeout: 0}"])
def test_a_section_reward_that_is_wrong_is_one_line(tmp_path, reward):
    (tmp_path / "c.yaml").write_text(f"reward: {reward}\n")
    with pytest.raises(config_file.ConfigError, match=r"^1 mistake in .*c\.yaml, section reward\n  "):
        config_file.load_reward(tmp_path / "c.yaml")
