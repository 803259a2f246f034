"""Graders of several data sets, and the further columns of a row for functions of users."""

import json
import pathlib

import numpy as np
import pytest

from oapl_jax.config import config_file
from oapl_jax.config.commands import GenerateConfig
from oapl_jax.config.data import DataConfig
from oapl_jax.config.reward import RewardConfig
from oapl_jax.rewards import functions, tasks
from oapl_jax.rewards.grader import SetGrader, ToyGrader, grader_of_sets
from oapl_jax.types import FinishReason, Grade, Prompt, Verdict

FOLDER, MINE = str(pathlib.Path(__file__).parent), {"test_set_grader:by_level": 1.0}


def prompt(name, text="?", answer="", **columns):
    return Prompt(name, np.zeros(1, np.int32), text, answer, columns)


def by_level(given: Prompt, response: str) -> float:
    """A reward function as a user would write it."""
    return given.columns["level"] if response == given.answer else 0.0


class Says:
    """A grader whose rewards name it, and which knows whether its golds were checked."""

    def __init__(self, reward):
        self.reward, self.checked, self.is_closed = reward, [], False

    def check_golds(self, prompts):
        self.checked += [one.id for one in prompts]

    def grade(self, items):
        return [Grade(Verdict.CORRECT, self.reward, text) for _, text, _ in items]

    def close(self):
        self.is_closed = True


def test_each_response_goes_to_the_grader_of_its_data_set_and_comes_back_in_order():
    one, other = Says(1.0), Says(2.0)
    grader = SetGrader({"a": one, "b": other, "evaluation.a": other, "": one})
    ids = ["a/0", "evaluation.a/0", "b/0", "table/17", "a/1"]
    grader.check_golds([prompt(name) for name in ids])
    assert (one.checked, other.checked) == (["a/0", "table/17", "a/1"], ["evaluation.a/0", "b/0"])
    with pytest.raises(ValueError, match="'table/17' is of none of the data sets a, b"):
        SetGrader({"a": one, "b": other}).grade([(prompt("table/17"), "", FinishReason.STOP)])
    grades = grader.grade([(prompt(name), name, FinishReason.STOP) for name in ids])
    assert [(grade.reward, grade.detail) for grade in grades] == list(zip([1.0, 2.0, 2.0, 1.0, 1.0], ids, strict=True))
    grader.close()
    assert one.is_closed
    assert other.is_closed


def test_data_sets_that_are_graded_alike_share_a_grader():
    data = DataConfig.model_validate(
        {"sets": {"a": {"task": "chain"}, "b": {"task": "countdown"}, "c": {"task": "chain"}}}
    )
    alike = data.model_copy(update={"sets": {name: data.sets[name] for name in ("a", "c")}})
    assert isinstance(grader_of_sets(alike.graded(RewardConfig())), ToyGrader)
    grader = grader_of_sets(data.graded(RewardConfig()))
    assert isinstance(grader, SetGrader)
    asked = [("a/0", "7+5=", "2"), ("b/0", "3741:24", "3*721+425-124"), ("c/0", "7+5=", "3"), ("b/1", "3741:24", "2")]
    grades = grader.grade([(prompt(name, text), response, FinishReason.STOP) for name, text, response in asked])
    assert [grade.verdict for grade in grades] == ["correct", "correct", "wrong", "wrong"]


@pytest.mark.parametrize(("response", "reward"), [("4", 3), ("5", 0)])
def test_a_function_finds_the_further_columns(response, reward):
    asked = prompt("a/0", answer="4", level=3)
    task = tasks.function_task(RewardConfig(folder=FOLDER, functions=MINE), *MINE, asked, [response])
    (grade,) = functions.call(json.loads(json.dumps(task)))
    assert grade.reward == reward


def test_functions_of_a_data_set_are_found_beside_the_config(tmp_path):
    path = tmp_path / "run.yaml"
    own = {"path": "x", "reward": {"functions": {"mine:f": 1.0}}}
    raw = {
        "run": {"dir": "x"},
        "model": {"path": "x"},
        "sampler": {"max_response_tokens": 6},
        "data": {"sets": {"a": own}},
    }
    path.write_text(json.dumps(raw))
    reward = config_file.load(GenerateConfig, path).data.sets["a"].reward
    assert reward is not None
    assert reward.folder == str(tmp_path)
