"""How responses are graded."""

import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from pydantic import Field

from oapl_jax.config.applies import AppliesWhen, one_of
from oapl_jax.config.section import Count, CountOrZero, Positive, PositiveOrZero, Section

CodeStatus = Literal[
    "accepted",
    "wrong_answer",
    "time_limit",
    "memory_limit",
    "output_limit",
    "runtime_error",
    "compile_error",
]
"""What may become of a program on a test."""


def _has_math(functions: Iterable[str]) -> bool:
    """``functions`` has ``math``."""
    return "math" in functions


def _has_code(functions: Iterable[str]) -> bool:
    """``functions`` has ``code``."""
    return "code" in functions


def _has_user(functions: Iterable[str]) -> bool:
    """``functions`` has one of yours, ``MODULE:FUNCTION``."""
    return any(":" in name for name in functions)


OF_MATH = AppliesWhen("functions", condition=_has_math)
OF_CODE = AppliesWhen("functions", condition=_has_code)
OF_USER = AppliesWhen("functions", condition=_has_user)


class RewardConfig(Section):
    """How responses are graded (built-in tasks grade themselves and need none of this; docs/rewards.md)."""

    functions: Annotated[dict[str, float], Field(min_length=1)] = Field(default={"math": 1.0})
    """Reward functions and their weights: ``math``, ``code``, or ``package.module:function``. The reward is the weighted
    sum; whether the response is correct is the verdict of the first."""
    folder: Annotated[str | None, OF_USER] = None
    """Folder of the modules of functions of yours, besides the installed packages; if it is left out, that of the config
    file."""
    concurrency: Annotated[Count, OF_USER] = 16
    """Calls of an ``async`` function of yours that a grading process has under way at a time."""
    workers: Count = 2
    """Grading processes."""
    timeout: Positive = 5.0
    """Seconds that one answer, or one call of a function of yours, may take. A call that takes longer is invalid; an answer
    is wrong if the gold answer is judged at once after it, else invalid. Programs have limits of their own."""
    retries: CountOrZero = 1
    """How often an invalid verdict is tried again, after half a second, one second, two, ..."""
    gold: Annotated[Literal["whole", "last_hash"], OF_MATH] = "whole"
    """math: where the gold answer stands in its column: all of it, or after the last ``####`` (GSM8K)."""
    answer: Annotated[Literal["boxed", "hash", "any"], OF_MATH] = "any"
    """math: where the answer stands: in the last box, after ``####`` in the last line, or in the box, the ``####`` or
    the last lines, whichever is there first."""
    form: Annotated[Literal["evaluated", "any"], OF_MATH] = "evaluated"
    """math: whether an answer has to be evaluated, so that ``3 + 4`` is wrong for 7, or may have any form of equal value.
    An expression that stands in the prompt, like the question itself, is wrong in both cases."""
    exec_mode: Annotated[Literal["script", "lcb"], OF_CODE] = "script"
    """code: programs with text tests run as ``python file.py``, or in LiveCodeBench's harness, to compare with it."""
    code_reward: Annotated[Literal["all", "fraction", "status"], OF_CODE] = "all"
    """code: 1 where all tests pass, else 0; the fraction that passes; or by what became of the first that does not."""
    status_rewards: Annotated[
        dict[CodeStatus, float], OF_CODE, AppliesWhen("code_reward", condition=one_of("status"))
    ] = Field(default={"accepted": 1.0})
    """code, with ``code_reward: status``: the reward of each outcome; 0 for those that are not named."""
    cpu_seconds: Annotated[Positive, OF_CODE] = 6.0
    """code: CPU time of one test."""
    wall_seconds: Annotated[Positive, OF_CODE] = 15.0
    """code: time of one test by the clock; well above the CPU time, or rewards depend on how busy the machine is."""
    memory_mb: Annotated[Count, OF_CODE] = 1024
    """code: memory of one test."""
    isolation: Annotated[Literal["namespaces", "uid", "landlock"], OF_CODE] = "namespaces"
    """code: the weakest level of the sandbox that is accepted (``oapl-jax check-sandbox``)."""
    packages: Annotated[list[str], OF_CODE] = Field(default=[])
    """code: packages that programs may import besides the standard library; loaded before the first test."""
    python: Annotated[str | None, OF_CODE] = None
    """code: interpreter of the programs, of our own version; null: ours, or a system one where it cannot be reached."""
    format_pattern: Annotated[str | None, AppliesWhen("format_bonus")] = None
    """Regular expression to be found in responses of the right form."""
    format_bonus: float = 0.0
    """Added to the reward of a finished response in which ``format_pattern`` is found."""
    length_penalty: PositiveOrZero = 0.0
    """Taken off the reward for every 1,000 characters of a response beyond ``length_free``."""
    length_free: Annotated[CountOrZero, AppliesWhen("length_penalty")] = 0
    """Characters without a penalty."""

    def find_mistakes(self) -> Iterator[str]:
        """Names of functions, and the pattern."""
        for name in self.functions:
            if not re.fullmatch(r"math|code|[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
                yield f"functions: {name!r} is not math, code, or package.module:function"
        if self.format_bonus and self.format_pattern is None:
            yield "format_bonus: needs format_pattern"
        try:
            re.compile(self.format_pattern or "")
        except re.error as error:
            yield f"format_pattern: {self.format_pattern!r} is not a regular expression: {error}"
