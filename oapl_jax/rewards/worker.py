"""The program of one grading process: it reads tasks from the socket on its standard input and replies on it.

``python -m oapl_jax.rewards.worker SETUP`` takes a ``Setup`` as a JSON array. A task (``tasks.py``) is one line of JSON,
and so is a reply: the ``grades`` of its responses. Expected outputs and gold answers are compared in this process. It
never runs a program of a model; its sandbox does. It does not import JAX, so that it starts in a fraction of a second.

For mathematics, the process that was started only imports and forks. The child that it forks serves the socket, and the
parent may kill it: the next child is there within milliseconds, to judge the canary and the gold answer of the row.
"""

import contextlib
import ctypes
import dataclasses
import functools
import json
import logging
import math
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from oapl_jax.rewards import functions
from oapl_jax.rewards.code import layouts, programs
from oapl_jax.rewards.math import answers
from oapl_jax.types import Grade, Verdict

MEMORY_LIMIT = 2 << 30
"""Bytes of address space. Beyond it an answer fails with MemoryError instead of filling the machine."""
MAX_DETAIL = 1000
PR_SET_PDEATHSIG = 1
CACHED_TESTS = 4
"""Prompts whose parsed tests are kept: the G rollouts of a prompt are graded one after another."""


class Setup(NamedTuple):
    """What a worker is started with."""

    kinds: Sequence[str] = ("math",)
    """Kinds of tasks to prepare for: ``math``, ``code``, functions of the user."""
    isolation: str = "namespaces"
    packages: Sequence[str] = ()
    python: str | None = None
    exec_mode: str = "script"
    folder: str | None = None
    """Where functions of the user are found besides the installed packages."""


def main(setup: Setup) -> None:
    """Serves until the parent closes the socket."""
    # Only the soft limit is lowered: a sandbox sets limits of its own.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    logging.disable(logging.CRITICAL)
    grader = TaskGrader(setup)
    if "math" in setup.kinds:
        while (child := os.fork()) > 0:
            if os.WIFEXITED(os.waitpid(child, 0)[1]):  # only one that was killed has a successor
                return
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    with socket.socket(fileno=0) as channel, channel.makefile("rwb") as stream:
        _send(stream, {"child": os.getpid()})
        for line in stream:
            task = json.loads(line)
            # The parent kills a late child. If the parent is gone, this alarm does, and it needs no Python to run.
            signal.setitimer(signal.ITIMER_REAL, 2 * task["timeout"] + 1)
            try:
                grades = grader.grade(task)
            except MemoryError:
                _send(stream, {"exhausted": "memory"})
                signal.pause()  # until the parent kills it
                return
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send(stream, {"grades": list(map(dataclasses.asdict, grades))})


class TaskGrader:
    """Grades tasks of all kinds in this process."""

    def __init__(self, setup: Setup) -> None:
        """Imports what the setup asks for, before the first deadline runs."""
        if "math" in setup.kinds:
            answers.grade_answer("x^2-1", r"\boxed{(x-1)(x+1)}")
        for path in (kind for kind in setup.kinds if ":" in kind):
            with contextlib.suppress(Exception):  # a task of the function says what is wrong with it
                functions.find(path, setup.folder)
        settings = programs.Settings(setup.isolation, tuple(setup.packages), setup.python)
        self._judge = programs.Judge(settings, setup.exec_mode)
        self._kinds = {"math": _grade_math, "code": self._grade_code, "function": functions.call}

    def grade(self, task: dict) -> list[Grade]:
        """The grades of the responses of a task. An exception is the grader's failure, never the response's.

        Raises MemoryError where an answer needs too much of it.
        """
        began = time.process_time()
        try:
            grades = self._kinds[task["kind"]](task)
        except (Exception, SystemExit) as error:
            if isinstance(error, MemoryError) and task["kind"] == "math":
                raise
            grades = [Grade(Verdict.INVALID, math.nan, f"{type(error).__name__}: {error}")]
            grades *= len(task.get("responses", (None,)))
        cpu_ms = 1000 * (time.process_time() - began) / len(grades)
        for i, grade in enumerate(grades):
            # The output of a program need not be valid text, but the rollout log accepts only text.
            detail = grade.detail[:MAX_DETAIL].encode("utf-8", "replace").decode()
            grades[i] = dataclasses.replace(grade, cpu_ms=round(grade.cpu_ms + cpu_ms, 3), detail=detail)
        return grades

    def _grade_code(self, task: dict) -> list[Grade]:
        program = task["program"] if "program" in task else programs.extract_program(task["response"])
        tests = _parsed_tests(task["tests"])
        if program is None:
            return [Grade(Verdict.WRONG, task["no_program_reward"], "no program: the response has no fenced block")]
        limits = programs.Limits(**task["limits"])
        results = self._judge.judge(program, tests, limits, stop_early=task["stop_early"])
        return [programs.make_grade(results, len(tests), task["rewards"], self._judge.level)]


@functools.lru_cache(maxsize=CACHED_TESTS)
def _parsed_tests(tests: str) -> list:
    return programs.parse_tests(layouts.read_tests(tests))


def _grade_math(task: dict) -> list[Grade]:
    options = {"prompt": task["prompt"], "is_evaluated": task["is_evaluated"]}
    is_correct, rule = answers.grade_answer(task["gold"], task["response"], task["answer"], **options)
    return [Grade(Verdict.CORRECT if is_correct else Verdict.WRONG, float(is_correct), rule)]


def _send(stream: Any, reply: dict) -> None:
    stream.write(json.dumps(reply).encode() + b"\n")
    stream.flush()


if __name__ == "__main__":
    main(Setup(*json.loads(sys.argv[1])))
