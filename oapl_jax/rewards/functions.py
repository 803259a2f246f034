"""Reward functions of users: a config names one as ``MODULE:FUNCTION``, and a grading worker calls it.

docs/rewards.md has the signatures; ``tasks.function_task`` makes the tasks.
"""

import asyncio
import functools
import importlib
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from oapl_jax.types import Grade, Prompt, Verdict

TAKES_GROUP = "takes a group"
"""Detail of the grade of a function that is only imported, where its tasks should have all responses of a group."""


@functools.cache
def find(path: str, folder: str | None) -> Callable[..., Any]:
    """Imports a function; ``folder`` comes first meanwhile, and afterwards last, so that it hides no library of ours."""
    module, _, name = path.partition(":")
    folders = [] if folder is None else [folder]
    sys.path[:0] = folders
    try:
        return getattr(importlib.import_module(module), name)
    except SystemExit as error:
        raise ImportError(f"{module} ends the program when it is imported") from error
    finally:
        sys.path[:] = [place for place in sys.path if place not in folders] + folders


def call(task: dict[str, Any]) -> list[Grade]:
    """Calls the function of a task; whatever it raises or returns beside numbers and grades is an invalid verdict.

    Without responses it only imports the function; the detail says whether it takes a group.
    """
    function = find(task["path"], task["folder"])
    has_all = "responses" in inspect.signature(function).parameters  # one call gets all responses of a group
    if "responses" not in task:
        takes_group = has_all or inspect.iscoroutinefunction(function)
        return [Grade(Verdict.CORRECT, 1.0, TAKES_GROUP if takes_group else "")]
    given, responses = task["prompt"], task["responses"]
    prompt = Prompt(**given | {"token_ids": np.asarray(given["token_ids"], np.int32)})
    calls = [responses] if has_all else responses
    results = _runner().run(_call_all(functools.partial(function, prompt), calls, task))
    return list(map(_grade, _split(results[0], len(responses)) if has_all else results))


@functools.cache
def _runner() -> asyncio.Runner:
    """One event loop for the worker's life: connections of the function's clients stay open."""
    return asyncio.Runner()


async def _call_all(function: Callable[[Any], Any], calls: Sequence[Any], task: dict[str, Any]) -> list[Any]:
    """Results and exceptions in the order of the calls."""
    gate = asyncio.Semaphore(task["concurrency"])

    async def call_one(argument: Any) -> Any:
        async with gate:
            result = function(argument)
            if not inspect.isawaitable(result):
                return result
            try:
                return await asyncio.wait_for(result, task["call_timeout"])
            except TimeoutError as error:
                raise TimeoutError(str(error) or f"no verdict in {task['call_timeout']:g} s") from error

    return await asyncio.gather(*map(call_one, calls), return_exceptions=True)


def _split(result: Any, count: int) -> list[Any]:
    """What a function returned for a group, for each response."""
    if isinstance(result, list | tuple | np.ndarray) and np.ndim(result) > 0 and len(result) == count:
        return list(result)
    if not isinstance(result, BaseException):
        wanted = f"list of a number or Grade for each of {count} responses"
        result = TypeError(f"returned {result!r:.80}, which is no {wanted}")
    return [result] * count


def _grade(result: Any) -> Grade:
    try:
        if isinstance(result, BaseException):
            raise result
        if not isinstance(result, Grade):
            reward = _number(result)
            return Grade(Verdict.CORRECT if reward >= 1 else Verdict.WRONG, reward)
        verdict = Verdict(result.verdict)
        reward = math.nan if verdict is Verdict.INVALID else _number(result.reward)
        return Grade(verdict, reward, str(result.detail), str(result.level), _number(result.cpu_ms))
    except Exception as error:
        return Grade(Verdict.INVALID, math.nan, f"{type(error).__name__}: {error}")


def _number(value: Any) -> float:
    """A finite number as Python's own; numbers of NumPy, and arrays without dimensions, have ``item``."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    raise TypeError(f"returned {value!r:.80}, which is neither a finite number nor a Grade")
