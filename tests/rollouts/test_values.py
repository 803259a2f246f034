"""V* of prompts from a log of a reference's samples, and groups that are graded with it."""

import dataclasses
import functools
import math

import pytest

from oapl_jax.data.tokenizer import CharacterTokenizer
from oapl_jax.objectives import a_star_po, oapl
from oapl_jax.rewards.grader import ToyGrader
from oapl_jax.rollouts.grading import Advantages, Grading
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.values import read_values
from oapl_jax.types import RunError
from rollouts.groups import group, prompt

VALUE = functools.partial(oapl.optimal_value, beta1=0.5)
HALF_RIGHT = 0.5 * math.log((1 + math.exp(2)) / 2)
"""V* of one right and one wrong response at beta1 0.5."""


def write(folder, groups):
    RolloutLog(folder / "rollouts").append(groups)


def test_values_are_those_of_all_samples_with_a_verdict(tmp_path):
    write(tmp_path, [group(0), group(1), group(2, is_usable=False)])
    assert read_values(tmp_path, VALUE) == {"test/0": pytest.approx(HALF_RIGHT), "test/1": pytest.approx(HALF_RIGHT)}


def test_samples_of_two_policies_or_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no rollouts"):
        read_values(tmp_path, VALUE)
    write(tmp_path, [group(0)])
    write(tmp_path, [group(0, version=1)])
    with pytest.raises(ValueError, match=r"policy versions \[0, 1\]"):
        read_values(tmp_path, VALUE)


def test_a_group_is_graded_with_the_value_of_its_prompt():
    grading = Grading(
        CharacterTokenizer().decode,
        ToyGrader("chain"),
        Advantages(
            lambda rewards, is_correct: a_star_po.OBJECTIVE.advantages(rewards, is_correct, None),
            VALUE,
            values={"test/0": 0.25},
        ),
    )
    graded = [dataclasses.replace(item, advantage=math.nan) for item in group(0).rollouts]
    assert grading.advantages("test/0", graded) == ([0.75, -0.25], 0.25)
    with pytest.raises(RunError, match=r"prompt test/1: objective\.values has no sample"):
        grading.advantages("test/1", graded)
    grading.check_values([prompt(0)])
    with pytest.raises(ValueError, match=r"no sample of 1 prompts, such as test/3"):
        grading.check_values([prompt(0), prompt(3)])
    grading.close()
