"""Judges programs: a sandbox runs them on tests, and their results are compared in this process.

The program of a response is its last fenced block after thinking. There are three kinds of tests: text in and text out,
the call of a function, and assertions. Assertions run in another child than the program, and every call between the
two passes through this process as data, so a program can neither read the assertions nor end them.
"""

import builtins
import dataclasses
import enum
import json
import re
import signal
import symtable
from collections.abc import Sequence
from typing import Any

from oapl_jax.rewards.code.compare import is_same_output, is_same_value
from oapl_jax.rewards.code.sandbox import sandbox
from oapl_jax.rewards.code.sandbox.confined import program as confined
from oapl_jax.rewards.code.sandbox.confined import values
from oapl_jax.rewards.code.sandbox.sandbox import Child, Limits, Sandbox, SandboxError, Settings
from oapl_jax.rewards.code.sandbox.self_test import open_sandbox
from oapl_jax.types import Grade, Verdict

_END_OF_THINKING = "</think>"
_FENCE = re.compile(r"^[ \t]*```[^`\n]*$", re.MULTILINE)
_KNOWN_NAMES = {*dir(builtins), *confined.names_for("test"), "__name__"}
MAX_DETAIL = 160


class Status(enum.StrEnum):
    """The outcome of one test."""

    ACCEPTED = "accepted"
    WRONG_ANSWER = "wrong_answer"
    TIME_LIMIT = "time_limit"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"
    RUNTIME_ERROR = "runtime_error"
    COMPILE_ERROR = "compile_error"


@dataclasses.dataclass(frozen=True)
class StdioTest:
    """Standard input and the expected standard output."""

    stdin: str
    stdout: str
    tolerance: float = 0.0


@dataclasses.dataclass(frozen=True)
class CallTest:
    """Arguments of a function (or of a method of ``Solution``) and its expected return values, as JSON values."""

    function: str
    args: list
    expected: tuple
    """The function must return one of these."""


@dataclasses.dataclass(frozen=True)
class AssertTest:
    """Python source that raises an exception if the program is wrong."""

    source: str
    remote: tuple[str, ...]
    """Names of the program that the source uses."""


Test = StdioTest | CallTest | AssertTest


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one test of one program."""

    status: Status
    detail: str
    cpu_s: float


def extract_program(response: str) -> str | None:
    """The last closed fenced block after the end of thinking, or None."""
    if "<think>" in response and _END_OF_THINKING not in response:
        return None
    text = response.rpartition(_END_OF_THINKING)[2]
    program, opening = None, None
    for fence in _FENCE.finditer(text):
        if opening is None:
            opening = fence
        elif fence[0].strip() == "```":
            program, opening = text[opening.end() + 1 : fence.start()], None
    return program


def parse_tests(tests: Any) -> list[Test]:
    """Tests from their JSON form: ``{stdin, stdout}``, ``{call, args, expected}`` or ``{assert}`` each.

    ``any_of`` instead of ``expected`` lists several right values; ``tolerance`` belongs to ``stdout``.

    Raises:
        ValueError: there are no tests, or one has another form or does not compile; the message names it.
    """
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"tests: should be a list of at least one test, but is {str(tests)[:80]!r}")
    return [_parse_test(number, test) for number, test in enumerate(tests)]


_FORMS = (
    ("stdin", "stdout"),
    ("stdin", "stdout", "tolerance"),
    ("args", "call", "expected"),
    ("any_of", "args", "call"),
    ("assert",),
)


def _parse_test(number: int, test: Any) -> Test:
    where, keys = f"tests[{number}]", tuple(sorted(test)) if isinstance(test, dict) else ()
    if keys not in _FORMS:
        forms = "stdin, stdout (and tolerance); or call, args, expected (or any_of, a list); or assert"
        raise ValueError(f"{where}: should have the keys {forms}: {test!r:.200}")
    texts = [test[key] for key in ("stdin", "stdout", "call", "assert") if key in test]
    if not all(isinstance(text, str) for text in texts) or not isinstance(test.get("args", []), list):
        raise ValueError(f"{where}: stdin, stdout, call and assert are text, args is a list: {test!r:.200}")
    if not isinstance(test.get("any_of", []), list) or type(test.get("tolerance", 0)) not in (int, float):
        raise ValueError(f"{where}: any_of is a list, tolerance a number: {test!r:.200}")
    if "stdin" in test:
        return StdioTest(test["stdin"], test["stdout"], float(test.get("tolerance", 0.0)))
    if "call" in test:
        return CallTest(test["call"], test["args"], tuple(test.get("any_of", [test.get("expected")])))
    try:
        remote = remote_names(test["assert"])
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{where}: the assertions do not compile: {error}") from error
    if not remote:
        raise ValueError(f"{where}: the assertions use no name that the program could define: {test['assert']!r:.200}")
    return AssertTest(test["assert"], remote)


def remote_names(source: str) -> tuple[str, ...]:
    """Names that the assertions use but do not define, so the program must define them.

    Built-in names are excluded, so that a program cannot redefine ``abs``. If the assertions use no other names, the
    built-in ones count: MBPP has a task whose function is called ``sum``.
    """
    module = symtable.symtable(source, "tests", "exec")
    defined = {name.get_name() for name in module.get_symbols() if name.is_assigned() or name.is_imported()}
    used, tables = set(), [module]
    for table in tables:
        tables += table.get_children()
        names = (name for name in table.get_symbols() if name.is_referenced())
        used |= {name.get_name() for name in names if table is module or name.is_global()}
    return tuple(sorted(used - defined - _KNOWN_NAMES or used & set(dir(builtins))))


class Judge:
    """Runs programs on tests, in sandboxes that it starts when they are first needed.

    Args:
        settings: settings of the sandboxes.
        mode: how text tests run a program: ``script``, or ``lcb`` for LiveCodeBench's own harness.
    """

    def __init__(self, settings: Settings, mode: str = "script") -> None:
        self._settings, self._mode = settings, mode
        self._sandboxes: list[Sandbox] = []

    @property
    def level(self) -> str:
        """The isolation level of the sandboxes."""
        return self._sandbox(0).level

    def judge(self, program: str, tests: Sequence[Test], limits: Limits, *, stop_early: bool) -> list[Result]:
        """Results in the order of the tests; with ``stop_early`` up to the first that is not accepted.

        Raises:
            SandboxError: the sandbox failed, so there is no verdict.
            IsolationError: no sandbox of the required level can be started.
        """
        results = []
        try:
            for test in tests:
                results.append(self._judge_twice(program, test, limits))
                if stop_early and results[-1].status != Status.ACCEPTED:
                    break
        except BaseException:
            self.close()
            raise
        return results

    def close(self) -> None:
        """Ends the sandboxes; the next program starts new ones."""
        while self._sandboxes:
            self._sandboxes.pop().close()

    def _sandbox(self, index: int) -> Sandbox:
        while len(self._sandboxes) <= index:
            self._sandboxes.append(open_sandbox(self._settings))
        return self._sandboxes[index]

    def _judge_twice(self, program: str, test: Test, limits: Limits) -> Result:
        """Runs a test again, but only once, if the child was killed from outside: a program can cause that itself."""
        run = {StdioTest: self._stdio, CallTest: self._call, AssertTest: self._asserts}[type(test)]
        result = run(program, test, limits)
        return run(program, test, limits) if result.detail == _KILLED else result

    def _stdio(self, program: str, test: StdioTest, limits: Limits) -> Result:
        worker = self._sandbox(0)
        child = worker.start(self._mode, program, limits, stdin=test.stdin, expected_output=len(test.stdout))
        sandbox.converse([(worker, child)], limits.wall_s)
        failed = _failure(child, limits)
        if failed is not None:
            return failed
        output = child.stdout.decode("utf-8", "surrogateescape")
        if is_same_output(output, test.stdout, test.tolerance):
            return Result(Status.ACCEPTED, "", child.cpu_s)
        return Result(Status.WRONG_ANSWER, f"printed {output[:MAX_DETAIL]!r}", child.cpu_s)

    def _call(self, program: str, test: CallTest, limits: Limits) -> Result:
        worker = self._sandbox(0)
        child = worker.start("serve", program, limits)
        target = {"t": "name", "v": test.function}
        args = [values.encode(argument) for argument in test.args]
        child.outbox += values.pack({"do": "call", "of": target, "args": args, "kwargs": {}})
        frames: list[dict] = []

        def on_frame(_: Child, frame: Any) -> None:
            frames.append(_checked(frame))
            child.end_requests()

        sandbox.converse([(worker, child)], limits.wall_s, on_frame)
        failed = _failure(child, limits)
        if failed is not None:
            return failed
        if len(frames) != 1 or child.has_unread_results:
            return Result(Status.WRONG_ANSWER, f"{len(frames)} results instead of one", child.cpu_s)
        reply, shown = frames[0], _shown(frames[0]["v"])
        if reply["t"] == "raised":
            return Result(Status.RUNTIME_ERROR, f"{reply.get('n')!s:.40}: {shown}", child.cpu_s)
        if any(is_same_value(reply["v"], expected) for expected in test.expected):
            return Result(Status.ACCEPTED, "", child.cpu_s)
        return Result(Status.WRONG_ANSWER, f"returned {shown}", child.cpu_s)

    def _asserts(self, program: str, test: AssertTest, limits: Limits) -> Result:
        ours, theirs = self._sandbox(0), self._sandbox(1)
        candidate = ours.start("serve", program, limits)
        try:
            tester = theirs.start("test", test.source, limits, remote=test.remote)
        except SandboxError:
            candidate.close()
            raise
        has_passed, num_asked = False, 0

        def on_frame(child: Child, frame: Any) -> None:
            nonlocal has_passed, num_asked
            if child is candidate:
                tester.outbox += values.pack(_checked(frame))
            elif frame["t"] == "passed":
                has_passed = True
                candidate.end_requests()
            else:
                num_asked += 1
                candidate.outbox += values.pack(frame)

        def on_end(child: Child) -> None:
            if child is tester:
                candidate.end_requests()
            else:
                theirs.kill(tester, "candidate")

        sandbox.converse([(ours, candidate), (theirs, tester)], limits.wall_s, on_frame, on_end)
        if tester.status == confined.EXIT_NO_DATA or (has_passed and num_asked == 0):
            said = tester.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise SandboxError(f"the test cannot be run: {said or 'it never calls the program'}"[:MAX_DETAIL])
        cpu_s = candidate.cpu_s + tester.cpu_s
        failed = _failure(candidate, limits)
        if failed is None and not has_passed:
            failed = _failure(tester, limits)
            if failed is not None and failed.status != Status.TIME_LIMIT:
                failed = Result(Status.WRONG_ANSWER, failed.detail, cpu_s)
            failed = failed or Result(Status.RUNTIME_ERROR, "the program ended before the assertions", cpu_s)
        return failed or Result(Status.ACCEPTED, "", cpu_s)


_KILLED = "killed from outside"


def _shown(value: Any) -> str:
    try:
        return json.dumps(value)[:MAX_DETAIL]
    except (RecursionError, MemoryError):
        return "too much to show"


def _checked(frame: Any) -> dict:
    """The reply of a candidate; it may be anything, so a ValueError is raised unless it has the form of a reply."""
    if not isinstance(frame, dict) or frame.get("t") not in ("value", "raised") or "v" not in frame:
        raise ValueError("not a reply")
    return frame


def _failure(child: Child, limits: Limits) -> Result | None:
    """Why a child has no result; None if it ended normally and in time."""
    said = child.stderr.decode(errors="replace").strip()[-MAX_DETAIL:]
    status = None
    if child.killed_for == "time" or sandbox.is_over_cpu(child, limits):
        status, said = Status.TIME_LIMIT, f"{child.cpu_s:.2f} s of CPU"
    elif child.killed_for in ("output", "frame"):
        status, said = Status.OUTPUT_LIMIT if child.killed_for == "output" else Status.RUNTIME_ERROR, "bad output"
    elif child.status == confined.EXIT_COMPILE:
        status = Status.COMPILE_ERROR
    elif child.status == confined.EXIT_MEMORY or (child.status != 0 and "MemoryError" in said):
        status = Status.MEMORY_LIMIT
    elif child.status == -signal.SIGKILL and not child.killed_for:
        status, said = Status.RUNTIME_ERROR, _KILLED
    elif child.status != 0:
        status, said = Status.RUNTIME_ERROR, f"exit {child.status} {said}"
    return None if status is None else Result(status, said, child.cpu_s)


def make_grade(results: Sequence[Result], num_tests: int, rewards: str | dict[str, float], level: str) -> Grade:
    """The grade of a program.

    Args:
        results: results of its tests, all or up to the first that failed.
        num_tests: number of tests.
        rewards: ``all``, ``fraction``, or the reward of each status.
        level: the isolation level that it ran at.
    """
    num_passed = sum(result.status is Status.ACCEPTED for result in results)
    failed = next((result for result in results if result.status is not Status.ACCEPTED), None)
    if failed is None and num_passed != num_tests:
        raise SandboxError(f"{num_passed} of {num_tests} tests were run")
    if isinstance(rewards, dict):
        reward = rewards.get(failed.status if failed else Status.ACCEPTED, 0.0)
    else:
        reward = num_passed / num_tests if rewards == "fraction" else float(failed is None)
    detail = f"{num_passed} of {num_tests} tests passed"
    if failed is not None:
        detail = f"{failed.status} in test {results.index(failed)}: {failed.detail}"
    verdict = Verdict.CORRECT if failed is None else Verdict.WRONG
    return Grade(verdict, reward, detail, level, 1000 * sum(result.cpu_s for result in results))
