"""The program of one grading process: it reads tasks from the socket on its standard input and replies on it.

``python -m oapl_jax.rewards.worker SETUP`` takes a ``Setup`` as a JSON object. A task (``tasks.py``) is one line of
JSON, and so is a reply: verdict, reward, detail, level, CPU milliseconds, or a list of such ``grades``. Expected outputs
and gold answers are compared in this process. It never runs a program of a model; its sandbox does. It does not import
JAX, so that it starts in a fraction of a second.

For mathematics, the process that was started only imports and forks. The child that it forks serves the socket, and the
parent may kill it: the next child is there within milliseconds. So an answer that exhausts its child can be told from a
grader or a machine that fails: the next child judges the canary and the gold answer of the row at once, or it does not.
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
from collections.abc import Callable
from typing import Any

from oapl_jax.rewards import functions
from oapl_jax.types import Grade, Verdict

MEMORY_LIMIT = 2 << 30
"""Bytes of address space. Beyond it an answer fails with MemoryError instead of filling the machine."""
MAX_DETAIL = 1000
PR_SET_PDEATHSIG = 1
EXHAUSTED = 75
"""Exit status of a child that is out of memory; only it, and one that was killed, has a successor."""
PROBE_SHARE = 0.1
"""Share of its time limit in which a canary or a gold answer has to be judged, so that an answer is to blame."""
CACHED_TESTS = 4
"""Prompts whose parsed tests are kept: the G rollouts of a prompt are graded one after another."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a worker is started with."""

    kinds: tuple[str, ...] = ("math",)
    """Kinds of tasks to prepare for: ``math``, ``code``, functions of the user."""
    isolation: str = "namespaces"
    packages: tuple[str, ...] = ()
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
    if "math" not in setup.kinds:
        _serve(grader)
        return
    while (child := os.fork()) > 0:
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) != EXHAUSTED:
            return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    try:
        _serve(grader)
    except BaseException:
        logging.disable(logging.NOTSET)
        logging.getLogger(__name__).exception("a grading process failed")
        os._exit(1)
    os._exit(0)


def _serve(grader: "TaskGrader") -> None:
    """Replies to tasks until the parent closes the socket."""
    with socket.socket(fileno=0) as channel, channel.makefile("rwb") as stream:
        _send(stream, {"child": os.getpid()})
        for line in stream:
            task = json.loads(line)
            # The parent kills a late child. If the parent is gone, this alarm does, and it needs no Python to run.
            signal.setitimer(signal.ITIMER_REAL, 2 * task["timeout"] + 1)
            try:
                reply = grader.answer(task)
            except MemoryError:
                _send(stream, {"exhausted": "memory"})
                os._exit(EXHAUSTED)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send(stream, reply)


class TaskGrader:
    """Grades tasks of all kinds in this process."""

    def __init__(self, setup: Setup) -> None:
        """Imports what the setup asks for, before the first deadline runs."""
        if "math" in setup.kinds:
            from oapl_jax.rewards.math import answers

            answers.grade_answer("x^2-1", r"\boxed{(x-1)(x+1)}")
        for path in (kind for kind in setup.kinds if ":" in kind):
            with contextlib.suppress(Exception):  # a task of the function says what is wrong with it
                functions.find(path, setup.folder)
        self._setup = setup
        self._kinds: dict[str, Callable[[dict], Grade]] = {
            "math": _grade_math,
            "gold": _check_gold,
            "code": self._grade_code,
            "function": functions.describe,
        }

    def answer(self, task: dict) -> dict[str, Any]:
        """The reply to a task of any kind; raises MemoryError as ``grade``."""
        if task["kind"] == "probe":
            return {"in_time": self.probe(task)}
        if "responses" in task:
            return {"grades": [dataclasses.asdict(grade) for grade in self.grade_responses(task)]}
        return dataclasses.asdict(self.grade(task))

    def grade(self, task: dict) -> Grade:
        """The grade of one task. An exception is the grader's failure, never the response's.

        Raises:
            MemoryError: an answer needs too much memory.
        """
        began = time.process_time()
        try:
            grade = self._kinds[task["kind"]](task)
        except Exception as error:
            if isinstance(error, MemoryError) and task["kind"] == "math":
                raise
            grade = Grade(Verdict.INVALID, math.nan, f"{type(error).__name__}: {error}"[:MAX_DETAIL])
        return _finished(grade, time.process_time() - began)

    def grade_responses(self, task: dict) -> list[Grade]:
        """The grades that a function of the user gives to the responses of its task."""
        began, count = time.process_time(), len(task["responses"])
        try:
            grades = functions.call(task)
        except (Exception, SystemExit) as error:
            grades = [Grade(Verdict.INVALID, math.nan, f"{type(error).__name__}: {error}")] * count
        return [_finished(grade, (time.process_time() - began) / count) for grade in grades]

    def probe(self, task: dict) -> bool:
        """Whether every answer of a probe is judged correct, each within a share of the time limit."""
        for answer in task["answers"]:
            began = time.monotonic()
            is_correct = self.grade(answer).verdict is Verdict.CORRECT
            if not is_correct or time.monotonic() - began > PROBE_SHARE * answer["timeout"]:
                return False
        return True

    def _grade_code(self, task: dict) -> Grade:
        from oapl_jax.rewards.code import programs

        program = task["program"] if "program" in task else programs.extract_program(task["response"])
        tests = _parsed_tests(task["tests"])
        if program is None:
            return Grade(Verdict.WRONG, task["no_program_reward"], "no program: the response has no fenced block")
        limits = programs.Limits(**task["limits"])
        results = self._judge.judge(program, tests, limits, stop_early=task["stop_early"])
        return programs.make_grade(results, len(tests), task["rewards"], self._judge.level)

    @functools.cached_property
    def _judge(self) -> Any:
        from oapl_jax.rewards.code.programs import Judge, Settings

        setup = self._setup
        return Judge(Settings(setup.isolation, tuple(setup.packages), setup.python), setup.exec_mode)


def _finished(grade: Grade, cpu_seconds: float) -> Grade:
    """With its time; the output of a program need not be valid text, but the rollout log accepts only text."""
    detail = grade.detail[:MAX_DETAIL].encode("utf-8", "replace").decode()
    return dataclasses.replace(grade, cpu_ms=round(grade.cpu_ms + 1000 * cpu_seconds, 3), detail=detail)


@functools.lru_cache(maxsize=CACHED_TESTS)
def _parsed_tests(tests: str) -> list:
    from oapl_jax.rewards.code import layouts, programs

    return programs.parse_tests(layouts.read_tests(tests))


def _grade_math(task: dict) -> Grade:
    from oapl_jax.rewards.math import answers

    is_correct, detail = answers.grade_answer(
        task["gold"], task["response"], task["answer"], prompt=task["prompt"], is_evaluated=task["is_evaluated"]
    )
    return Grade(Verdict.CORRECT if is_correct else Verdict.WRONG, float(is_correct), detail)


def _check_gold(task: dict) -> Grade:
    from oapl_jax.rewards.math import answers

    is_usable = answers.is_usable_gold(task["gold"])
    return Grade(Verdict.CORRECT if is_usable else Verdict.WRONG, float(is_usable))


def _send(stream: Any, reply: dict) -> None:
    stream.write(json.dumps(reply).encode() + b"\n")
    stream.flush()


if __name__ == "__main__":
    main(Setup(**json.loads(sys.argv[1])))
