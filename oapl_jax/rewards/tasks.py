"""Tasks for grading workers: all that a worker needs to grade one response, as JSON.

The canaries are tasks with known verdicts; they are graded before a run starts.
"""

from collections.abc import Sequence
from typing import Any

from oapl_jax.config.reward import RewardConfig
from oapl_jax.rewards.math import answers
from oapl_jax.rewards.worker import Setup
from oapl_jax.types import Prompt

START_SECONDS = 60.0
"""Added to the time limits of a program's tests, for starting a sandbox and for comparing outputs."""


def make_setup(reward: RewardConfig, kinds: tuple[str, ...]) -> Setup:
    """What workers for these kinds of tasks are started with."""
    return Setup(kinds, reward.isolation, reward.packages, reward.python, reward.exec_mode, reward.folder)


def math_task(reward: RewardConfig, gold: str, response: str, prompt: str = "") -> dict[str, Any]:
    """The task of comparing the answer in a response with the gold answer."""
    task = {"kind": "math", "gold": gold, "response": response, "prompt": prompt, "timeout": reward.timeout}
    return task | {"answer": reward.answer, "is_evaluated": reward.form == "evaluated"}


def quick_tasks(task: dict[str, Any]) -> list[dict[str, Any]]:
    """Beside a task of mathematics: the canary, and its gold answer as a response."""
    pairs = (_CANARY, (task["gold"], task["gold"]))
    responses = [(gold, answers.response_with(answer, task["answer"])) for gold, answer in pairs]
    return [task | {"gold": gold, "response": response, "prompt": ""} for gold, response in responses]


def code_task(
    reward: RewardConfig, tests: str, num_tests: int, limits: dict[str, float] | None = None, **source: str
) -> dict[str, Any]:
    """The task of running a ``program``, or that in a ``response``, on tests in any layout of ``layouts.py``, as JSON.

    ``limits`` has ``cpu_s``, ``wall_s``, ``memory_mb`` where they differ from those of ``reward``.
    """
    usual = {"cpu_s": reward.cpu_seconds, "wall_s": reward.wall_seconds, "memory_mb": reward.memory_mb}
    limits = usual | (limits or {})
    rewards: Any = dict(reward.status_rewards) if reward.code_reward == "status" else reward.code_reward
    return {
        "kind": "code",
        "tests": tests,
        **source,
        "limits": limits,
        "rewards": rewards,
        "no_program_reward": rewards.get("compile_error", 0.0) if isinstance(rewards, dict) else 0.0,
        "stop_early": reward.code_reward != "fraction",
        "timeout": START_SECONDS + 2 * num_tests * limits["wall_s"],
    }


def function_task(
    reward: RewardConfig, path: str, prompt: Prompt | None = None, responses: Sequence[str] = ()
) -> dict[str, Any]:
    """The task of calling a function of the user; without a prompt the worker only imports it."""
    task = {"kind": "function", "path": path, "folder": reward.folder, "timeout": reward.timeout}
    if prompt is None:
        return task
    task |= {
        "prompt": vars(prompt) | {"token_ids": prompt.token_ids.tolist()},
        "responses": list(responses),
        "concurrency": reward.concurrency,
    }
    if len(responses) > 1:  # the worker limits each call; this limit is for one that hangs
        task["timeout"] = reward.timeout * -(-len(responses) // reward.concurrency) + 1
    return task | {"call_timeout": reward.timeout}


_DOUBLE = '[{"stdin": "3\\n", "stdout": "6\\n"}, {"stdin": "-1\\n", "stdout": "-2\\n"}]'
_DOUBLE_CALL = '[{"call": "double", "args": [[1, 2]], "expected": [2, 4]}]'
_DOUBLE_ASSERT = '[{"assert": "assert double([1, 2]) == [2, 4]"}]'
_FUNCTION = "def double(values):\n    return [2 * value for value in values]\n"
_EQUAL = "class Equal:\n    def __eq__(self, other):\n        return True\n"
_CODE_CANARIES = (
    (_DOUBLE, "print(2 * int(input()))", True),
    (_DOUBLE, "import sys\nfor line in sys.stdin:\n    print(int(line) * 2)", True),
    (_DOUBLE_CALL, _FUNCTION, True),
    (_DOUBLE_ASSERT, _FUNCTION, True),
    (_DOUBLE, "print(6)", False),
    (_DOUBLE, "import os\nos._exit(0)", False),
    (_DOUBLE, "print(2 * int(input())", False),
    (_DOUBLE_CALL, f"{_EQUAL}def double(values):\n    return Equal()", False),
    (_DOUBLE_ASSERT, f"{_EQUAL}def double(values):\n    return Equal()", False),
    (_DOUBLE_ASSERT, "import os\ndef double(values):\n    os._exit(0)", False),
)
_CANARY = (r"\frac{1}{2}", "0.5")
_MATH_CANARIES = (
    (*_CANARY, True),
    ("1000", "1,000", True),
    ("10", r"\$10", True),
    ("x^2-1", "(x-1)(x+1)", True),
    ("1/2^{99}", "1/2^{98}", False),
    ("7", "10^{10^{10}}", False),
    ("7", "3+4", False),
    ("7", "", False),
)


def canaries(reward: RewardConfig) -> list[tuple[dict[str, Any], bool]]:
    """Tasks of the kinds that a config uses, each with whether its verdict should be correct."""
    found = []
    if "math" in reward.functions:
        found += [
            (math_task(reward, gold, answers.response_with(answer, reward.answer)), is_correct)
            for gold, answer, is_correct in _MATH_CANARIES
            if answer != "3+4" or reward.form == "evaluated"
        ]
    if "code" in reward.functions:
        found += [(code_task(reward, tests, 2, program=program), ok) for tests, program, ok in _CODE_CANARIES]
    return found
