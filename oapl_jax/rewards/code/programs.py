"""Judges programs: a sandbox runs them on tests, and their results are compared in this process.

The program of a response is its last fenced block after thinking. There are three kinds of tests: text in and text out,
the call of a function, and assertions. Assertions run in another child than the program, and every call between the
two is data, so a program can neither read the assertions nor end them.
"""

import ast
import builtins
import contextlib
import enum
import json
import os
import re
import signal
import symtable
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from oapl_jax.rewards.code.compare import is_same_output
from oapl_jax.rewards.code.sandbox import sandbox
from oapl_jax.rewards.code.sandbox.confined import program as confined
from oapl_jax.rewards.code.sandbox.sandbox import Ended, Limits, Sandbox, SandboxError, Settings
from oapl_jax.rewards.code.sandbox.self_test import open_sandbox
from oapl_jax.types import Grade, Verdict

_END_OF_THINKING = "</think>"
_FENCE = re.compile(
    r"^(?P<indent>[ \t]*(?:(?:>|(?:[-*+]|\d{1,9}[.)])[ \t])[ \t]*)*)(?P<fence>`{3,}|~{3,})(?P<info>[^\n]*)$",
    re.MULTILINE,
)
"""A line that opens or closes a fenced block (CommonMark), perhaps in a list item or a block quote."""
_PYTHON = re.compile(r"[{.\s]*(?:python|py)[\d.]*(?![a-z])", re.IGNORECASE)
_STATEMENT = re.compile(
    r"^[ \t]*+(?:import |from \S+ import |def \w+\(|class \w+|(?:for|while|if|with|try)\b.*:[ \t]*$"
    r"|(?!>>>).*(?:\b(?:input|open|print) ?\(|\bsys\.std))",
    re.MULTILINE,
)
"""A line that makes a block without a language a program; example output has none. ``*+`` gives no space back: a line of
spaces would take minutes."""
_KNOWN_NAMES = {*dir(builtins), *confined.names_for("test"), "__name__"}
MAX_DETAIL = 160
_CALL = f"""
import json as _json, os as _os, sys as _sys
_name, _args, _right = _json.load(_sys.stdin)
_result = globals()[_name](*_args)
_result = list(_result) if isinstance(_result, tuple) else _result
if not any(_result == each for each in _right):
    print(f"returned {{_result!r:.{MAX_DETAIL}}}", file=_sys.stderr, flush=True)
    _os._exit({confined.EXIT_WRONG})
"""
"""The assertions of a call test. A tuple counts as a list, but not inside of another value."""


class Status(enum.StrEnum):
    """The outcome of one test."""

    ACCEPTED = "accepted"
    WRONG_ANSWER = "wrong_answer"
    TIME_LIMIT = "time_limit"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"
    RUNTIME_ERROR = "runtime_error"
    COMPILE_ERROR = "compile_error"


class StdioTest(NamedTuple):
    """A test of what a program prints."""

    stdin: str
    stdout: str
    tolerance: float = 0.0


class AssertTest(NamedTuple):
    """Python source that raises an exception if the program is wrong."""

    source: str
    remote: tuple[str, ...]
    """Names of the program that the source uses."""
    stdin: str = ""


Test = StdioTest | AssertTest


class Result(NamedTuple):
    """The result of one test of one program."""

    status: Status
    detail: str
    cpu_s: float


def extract_program(response: str) -> str | None:
    """The last closed fenced block after the end of thinking that is Python, or None if no block could be.

    A block is Python if its first line says so; or if it names no language, has a line that only a program has, and
    parses. If there is no such block, the last one that names no language counts.
    """
    if "<think>" in response and _END_OF_THINKING not in response:
        return None
    unnamed = None
    for info, block in reversed(list(_fenced_blocks(response.rpartition(_END_OF_THINKING)[2]))):
        if _PYTHON.match(info) and not block.lstrip().startswith(">>>"):
            return block
        if not info:
            unnamed = unnamed or block
            with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of unknown escapes, in the terminal of the run
                if _STATEMENT.search(block) and ast.parse(block):  # pseudo-code does not parse
                    return block
    return unnamed


def _fenced_blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yields the closed blocks: what stands after the opening fence, and the lines, without the fence's indentation."""
    opening = None
    for line in _FENCE.finditer(text):
        indent, fence, info = line["indent"], line["fence"], line["info"].strip()
        if opening is None:
            if "`" not in info:
                opening = line
            continue
        depth, spaces = opening["indent"].count(">"), opening["indent"].rpartition(">")[2]
        if not info and indent.count(">") == depth and not indent.strip("> \t") and fence.startswith(opening["fence"]):
            block = text[opening.end() + 1 : line.start()]
            prefix = rf"^(?:[ \t]*>){{0,{depth}}}[ \t]{{0,{len(spaces)}}}"
            yield opening["info"].strip(), re.sub(prefix, "", block, flags=re.MULTILINE)
            opening = None


def parse_tests(tests: Any) -> list[Test]:
    """Tests from their JSON form: ``{stdin, stdout}``, ``{call, args, expected}`` or ``{assert}`` each.

    ``any_of`` instead of ``expected`` lists several right values; ``tolerance`` belongs to ``stdout``. A ValueError names
    the first test of another form, or that does not compile.
    """
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"tests: should be a list of at least one test, but is {str(tests)[:80]!r}")
    return [_parse_test(number, test) for number, test in enumerate(tests)]


_FORMS = ("stdin stdout", "stdin stdout tolerance", "args call expected", "any_of args call", "assert")
_TYPES = dict.fromkeys(("stdin", "stdout", "call", "assert"), (str,)) | dict.fromkeys(("args", "any_of"), (list,))
_TYPES |= {"tolerance": (int, float)}


def _parse_test(number: int, test: Any) -> Test:
    where, keys = f"tests[{number}]", " ".join(sorted(map(str, test))) if isinstance(test, dict) else ""
    if keys not in _FORMS:
        forms = "stdin, stdout (and tolerance); or call, args, expected (or any_of, a list); or assert"
        raise ValueError(f"{where}: should have the keys {forms}: {test!r:.200}")
    if any(type(value) not in _TYPES.get(key, (type(value),)) for key, value in test.items()):
        kinds = "args and any_of are lists, tolerance is a number, stdin, stdout, call and assert are text"
        raise ValueError(f"{where}: {kinds}: {test!r:.200}")
    if "stdin" in test:
        return StdioTest(test["stdin"], test["stdout"], float(test.get("tolerance", 0.0)))
    if "call" in test:
        right = test.get("any_of", [test.get("expected")])
        return AssertTest(_CALL, (test["call"],), json.dumps([test["call"], test["args"], right]))
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
    """Runs programs on tests in sandboxes that it starts when they are first needed; ``mode`` is ``script`` or ``lcb``."""

    def __init__(self, settings: Settings, mode: str = "script") -> None:
        self._settings, self._mode = settings, mode
        self._sandboxes: list[Sandbox] = []

    @property
    def level(self) -> str:
        """The isolation level of the sandboxes."""
        return self._sandbox(0).level

    def judge(self, program: str, tests: Sequence[Test], limits: Limits, *, stop_early: bool) -> list[Result]:
        """Results in the order of the tests; with ``stop_early`` up to the first that is not accepted.

        Raises SandboxError or IsolationError if the sandbox failed or does not start, so there is no verdict.
        """
        results = []
        try:
            for test in tests:
                run: Callable[..., Result] = self._stdio if isinstance(test, StdioTest) else self._asserts
                result = run(program, test, limits)
                if result.detail == _KILLED:  # from outside; only once, because a program can cause that itself
                    result = run(program, test, limits)
                results.append(result)
                if stop_early and result.status != Status.ACCEPTED:
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

    def _stdio(self, program: str, test: StdioTest, limits: Limits) -> Result:
        worker = self._sandbox(0)
        worker.start(self._mode, program, limits, stdin=test.stdin, expected=len(test.stdout))
        (child,) = sandbox.converse([worker], limits.wall_s)
        failed = _failure(child, limits)
        if failed is not None:
            return failed
        output = child.stdout.decode("utf-8", "surrogateescape")
        if is_same_output(output, test.stdout, test.tolerance):
            return Result(Status.ACCEPTED, "", child.cpu_s)
        return Result(Status.WRONG_ANSWER, f"printed {output[:MAX_DETAIL]!r}", child.cpu_s)

    def _asserts(self, program: str, test: AssertTest, limits: Limits) -> Result:
        """Runs a program and its tests in two children that ask each other through pipes."""
        ours, theirs = self._sandbox(0), self._sandbox(1)
        # What the data of the tests need is no part of the program's limits.
        size_mb = len(test.stdin) / 1e6
        more = limits._replace(cpu_s=limits.cpu_s + size_mb, memory_mb=limits.memory_mb + int(32 * size_mb))
        ends: list[int] = []
        try:
            ends += [*os.pipe(), *os.pipe()]
            ours.start("serve", program, limits, channel=(ends[1], ends[2]))
            channel = (ends[3], ends[0])
            theirs.start("test", test.source, more, remote=test.remote, stdin=test.stdin, channel=channel)
        except OSError as error:
            raise SandboxError(f"a run could not be started: {error}") from error
        finally:
            for end in ends:
                os.close(end)
        candidate, tester = sandbox.converse([ours, theirs], limits.wall_s)
        has_passed = tester.status == confined.EXIT_PASSED and not tester.killed_for
        if tester.status == confined.EXIT_UNASKED:
            raise SandboxError("the test cannot be run: it never calls the program")
        failed = _failure(candidate, limits)
        if failed is None and not has_passed:
            failed = _failure(tester, more) or Result(Status.WRONG_ANSWER, "the assertions did not reach their end", 0)
            if test.source is not _CALL and failed.status is not Status.TIME_LIMIT:
                failed = failed._replace(status=Status.WRONG_ANSWER)
        return (failed or Result(Status.ACCEPTED, "", 0))._replace(cpu_s=candidate.cpu_s + tester.cpu_s)


_KILLED = "killed from outside"
_NO_MEMORY = ("MemoryError", "[Errno 12]")


def _failure(child: Ended, limits: Limits) -> Result | None:
    """Why a child has no result: the first cause that holds; None if it ended normally and in time."""
    said = _last_lines(child.stderr.decode(errors="replace").strip())
    status, reason = child.status, child.killed_for
    most = limits.cpu_s / sandbox.CPU_MARGIN if status == -signal.SIGKILL else limits.cpu_s
    is_late = reason == "time" or status == -signal.SIGXCPU or child.cpu_s > most
    is_without_memory = status == confined.EXIT_MEMORY or (status != 0 and any(sign in said for sign in _NO_MEMORY))
    causes = (
        (is_late, Status.TIME_LIMIT, f"{child.cpu_s:.2f} s of CPU"),
        (reason in ("output", "files"), Status.OUTPUT_LIMIT, f"too much: {reason}"),
        (reason == "threads", Status.RUNTIME_ERROR, "too many threads"),
        (status == confined.EXIT_COMPILE, Status.COMPILE_ERROR, said),
        (status == confined.EXIT_WRONG, Status.WRONG_ANSWER, said),
        (is_without_memory, Status.MEMORY_LIMIT, said),
        (status == -signal.SIGKILL, Status.RUNTIME_ERROR, _KILLED),
        (status != 0, Status.RUNTIME_ERROR, f"exit {status} {said}"),
    )
    return next((Result(outcome, detail, child.cpu_s) for holds, outcome, detail in causes if holds), None)


def _last_lines(text: str) -> str:
    """The last lines that fit into a detail; of a longer line its end."""
    kept = text[-MAX_DETAIL:]
    return kept if kept == text else kept.partition("\n")[2] or kept


def make_grade(results: Sequence[Result], num_tests: int, rewards: str | dict[str, float], level: str) -> Grade:
    """The grade of a program from its results; ``rewards`` is ``all``, ``fraction``, or the reward of each status."""
    num_passed = sum(result.status is Status.ACCEPTED for result in results)
    failed = next((result for result in results if result.status is not Status.ACCEPTED), None)
    if failed is None and num_passed != num_tests:
        raise SandboxError(f"{num_passed} of {num_tests} tests were run")
    if isinstance(rewards, dict):
        reward = rewards.get(failed.status if failed else Status.ACCEPTED, 0.0)
    else:
        reward = num_passed / num_tests if rewards == "fraction" else float(failed is None)
    cpu_ms = 1000 * sum(result.cpu_s for result in results)
    if failed is None:
        return Grade(Verdict.CORRECT, reward, f"{num_passed} of {num_tests} tests passed", level, cpu_ms)
    detail = f"{failed.status} in test {results.index(failed)}: {failed.detail}"
    return Grade(Verdict.WRONG, reward, detail, level, cpu_ms)
