"""Reward functions of users: found, tried before a run, called in three ways, and whatever they return."""

import textwrap
import time

import numpy as np
import pytest

from oapl_jax.config.reward import RewardConfig
from oapl_jax.rewards import functions, grader
from oapl_jax.rollouts.grading import Advantages, Grading
from oapl_jax.types import FinishReason, Grade, Prompt, Rollout, RunError, Verdict

MODULE = '''
import asyncio
import helper_of_mine

def same(prompt, response):
    return helper_of_mine.equal(response, prompt.answer)

def needs_a_number(prompt, response):
    return float(response)

def ranks(prompt, responses):
    """The longest of the group is the best."""
    return [float(len(response) == max(map(len, responses))) for response in responses]

def too_few(prompt, responses):
    return [1.0]

async def judge(prompt, response):
    await asyncio.sleep(60 if response == "late" else 0.5)
    return 1.0

async def judge_all(prompt, responses):
    await asyncio.sleep(0)
    return [{"verdict": 1}, 1, 0.5][: len(responses)]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a config's modules, which is not on PYTHONPATH."""
    folder = tmp_path_factory.mktemp("beside")
    (folder / "mine.py").write_text(textwrap.dedent(MODULE))
    (folder / "helper_of_mine.py").write_text("def equal(a, b): return a == b\n")
    (folder / "yaml.py").write_text("def f(prompt, response): return 1\n")  # hides an installed package
    (folder / "ends.py").write_text("raise SystemExit\n")
    return str(folder)


@pytest.fixture
def make(folder):
    """Makes graders of one function."""
    made = []

    def make_grader(name, **options):
        values = {"functions": {name: 1.0}, "folder": folder, "workers": 1, "retries": 0, "timeout": 20.0} | options
        made.append(grader.grader_of(None, RewardConfig.model_validate(values)))
        return made[-1]

    yield make_grader
    for running in made:
        running.close()


def prompt(answer="7"):
    return Prompt("rows/0", np.zeros(1, np.int32), "?", answer)


def grade(running, *groups):
    """Verdict and reward of each response; a group is a list of responses to a prompt of its own."""
    items = [(asked, text, FinishReason.STOP) for group in groups for asked in [prompt()] for text in group]
    return [(item.verdict.value, item.reward, item.detail) for item in running.grade(items)]


def test_functions_are_found_in_the_folder_and_called_in_three_ways(make):
    running = make("mine:same")
    running.check_golds([prompt()])
    assert [found[:2] for found in grade(running, ["7", "8"])] == [("correct", 1.0), ("wrong", 0.0)]

    make("yaml:f").check_golds([prompt()])
    assert [found[1] for found in grade(make("mine:ranks"), ["a", "bb"], ["ccc", "d", "e"])] == [0, 1, 1, 0, 0]

    running = make("mine:judge", timeout=2.0, concurrency=4)
    running.check_golds([prompt()])
    start = time.monotonic()
    found = grade(running, ["a", "b", "late", "c"], ["d"])
    assert time.monotonic() - start < 8
    assert [verdict for verdict, *_ in found] == ["correct", "correct", "invalid", "correct", "correct"]
    assert found[2][2] == "TimeoutError: no verdict in 2 s"

    found = grade(make("mine:judge_all"), ["a", "b", "c"])
    assert [item[0] for item in found] == ["invalid", "correct", "wrong"]
    assert "{'verdict': 1}, which is neither a finite number nor a Grade" in found[0][2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine:nothing", "cannot be used: AttributeError"),
        ("nowhere:f", "cannot be used: ModuleNotFoundError"),
        ("ends:f", "cannot be used: ImportError: ends ends the program"),
        ("mine:needs_a_number", "fails on the first prompt, rows/0, with its answer as the response: ValueError"),
        ("mine:too_few", r"fails on .*returned \[1.0\], which is no list"),
    ],
)
def test_a_function_that_does_not_work_stops_the_run_before_it_starts(make, name, message):
    running = make(name)
    with pytest.raises(ValueError, match=f"reward.functions: '{name}' {message}"):
        running.check_golds([prompt("seven"), prompt("8")])


def odd_grade(verdict, reward, **fields):
    """A grade as a function may make it, whose types nobody checks."""
    found = object.__new__(Grade)
    for name, value in {
        "verdict": verdict,
        "reward": reward,
        "detail": "",
        "level": "",
        "cpu_ms": 0.0,
        **fields,
    }.items():
        object.__setattr__(found, name, value)
    return found


class Unprintable:
    def __repr__(self):
        raise KeyError("no text")


@pytest.mark.parametrize(
    ("result", "verdict", "reward"),
    [
        (1, "correct", 1.0),
        (True, "correct", 1.0),
        (np.float32(0.5), "wrong", 0.5),
        (np.int64(2), "correct", 2.0),
        (np.bool_(False), "wrong", 0.0),
        (np.array(1.5), "correct", 1.5),
        (odd_grade(Verdict.CORRECT, np.float32(0.25)), "correct", 0.25),
        (odd_grade("wrong", np.int32(-1), detail=np.str_("why"), cpu_ms=np.float64(2)), "wrong", -1.0),
        (Grade(Verdict.INVALID, float("nan"), "the judge is away"), "invalid", None),
        (odd_grade("maybe", 1.0), "invalid", None),
        (odd_grade(Verdict.CORRECT, None), "invalid", None),
        (odd_grade(Verdict.CORRECT, 1.0, cpu_ms="x"), "invalid", None),
        (np.float32("nan"), "invalid", None),
        (float("inf"), "invalid", None),
        (10**400, "invalid", None),
        (1 + 0j, "invalid", None),
        (np.array([1.0]), "invalid", None),
        ("1", "invalid", None),
        (None, "invalid", None),
        ({"reward": 1}, "invalid", None),
        ([1.0], "invalid", None),
        (Unprintable(), "invalid", None),
        (ValueError("\ud800"), "invalid", None),
    ],
)
def test_numbers_of_all_kinds_and_grades_count_and_nothing_else(result, verdict, reward):
    found = functions._grade(result)
    assert found.verdict.value == verdict
    if reward is None:
        assert np.isnan(found.reward)
        assert found.detail
    else:
        assert (type(found.reward), found.reward) == (float, reward)
    assert {type(found.detail), type(found.level)} == {str}


class Always:
    """A grader that fails."""

    def __init__(self, *details):
        self._details = details

    def check_golds(self, prompts):
        pass

    def close(self):
        pass

    def grade(self, items):
        return [Grade(Verdict.INVALID, float("nan"), self._details[i % len(self._details)]) for i in range(len(items))]


def test_when_all_verdicts_are_invalid_the_error_has_the_most_frequent_reason():
    advantages = Advantages(lambda rewards, _: rewards, lambda rewards: 0.0)
    grading = Grading(str, Always("no key", "no key", "late"), advantages)
    rollout = Rollout(np.zeros(1, np.int32), np.zeros(1, np.float32), FinishReason.STOP)
    grading.grade([(prompt(), [rollout] * 12)])
    with pytest.raises(RunError, match=r"the last 312 verdicts are all invalid, 208 because: no key"):
        grading.grade([(prompt(), [rollout] * 300)])
