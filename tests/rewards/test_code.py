"""The code grader: the program of a response, the three kinds of tests, and how the end of a program is judged."""

import json

import pytest

from oapl_jax.rewards.code import layouts, programs
from oapl_jax.rewards.code.programs import Judge, Limits, Settings, Status

pytestmark = pytest.mark.usefixtures("sandboxed")

LIMITS = Limits(cpu_s=2, wall_s=20, memory_mb=256)


@pytest.fixture(scope="module")
def lcb(level):
    running = Judge(Settings(level), "lcb")
    yield running
    running.close()


def status(judge, program, tests, limits=LIMITS):
    """The status of the first test that failed, or `accepted`."""
    return str(judge.judge(program, programs.parse_tests(tests), limits, stop_early=True)[-1].status)


def prints(given, expected):
    return [{"stdin": given, "stdout": expected}]


SCRIPTS = {
    "iteration over stdin": "import sys\nprint(sum(int(line) for line in sys.stdin))",
    "input, then read": "import sys\nprint(int(input()) + sum(map(int, sys.stdin.read().split())))",
    "lines of the buffer": "import sys\nb = sys.stdin.buffer\nprint(int(b.readline()) + int(b.readline()))",
    "open(0)": "print(sum(map(int, open(0).read().split())))",
    "os.read and os.write": "import os\nos.write(1, str(sum(map(int, os.read(0, 99).split()))).encode())",
    "bytes to stdout": "import sys\nsys.stdout.buffer.write(b'%d' % (int(input()) + int(input())))",
    "a guard that is not last": "def f():\n    global n\n    n = int(input()) + int(input())\nif __name__ == '__main__':\n    f()\nprint(n)",
    "/dev/stdin": "import os\nf = open('/dev/stdin')\nprint(int(f.readline()) + int(f.read()) + 0 // os.path.exists('/dev/stdin'))",
    "/dev/stdin without a buffer": "import io\nf = io.FileIO('/dev/stdin')\nprint(sum(map(int, f.read().split())))\nio.FileIO('/dev/stdout', 'w').write(b'')",
    "a file without a buffer": "import io\nprint(io.FileIO(0).read().count(b'4') + 6)\nassert issubclass(io.FileIO, io.RawIOBase)",
    "a copy of a temporary file": "import shutil, tempfile\nd = tempfile.mkdtemp()\nopen(d + '/a', 'w').write('7')\nshutil.copy(d + '/a', d + '/b')\nprint(open(d + '/b').read())",
    "a copy of a temporary folder": "import shutil, tempfile\nd = tempfile.mkdtemp()\nopen(d + '/a', 'w').write('7')\nshutil.copytree(d, d + '/b')\nshutil.copy2(d + '/b/a', d + '/c')\nprint(open(d + '/c').read())",
    "a stack without a limit": "import resource\nresource.setrlimit(resource.RLIMIT_STACK, (1 << 28, resource.RLIM_INFINITY))\nprint(7)",
    "a thread that nobody waits for": "import threading\nthreading.Thread(target=lambda: print(int(input()) + int(input()))).start()",
    "atexit": "import atexit\natexit.register(lambda: print(int(input()) + int(input())))",
    "quit": "print(int(input()) + int(input()))\nquit()",
    "exit with a status": "import sys\nprint(int(input()) + int(input()))\nsys.exit(3)",
    "a future import": "from __future__ import annotations\nprint(int(input()) + int(input()))",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**6)\ndef f(n):\n    return 0 if n == 0 else 1 + f(n - 1)\nprint(f(50000) - 49993 + 0 * int(input()))",
    "dataclasses and typing": "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nprint(P(int(input()) + int(input())).x)",
    "an import of its own": "import heapq, collections, bisect\nprint(collections.deque([int(input()) + int(input())])[0])",
}


@pytest.mark.parametrize("program", SCRIPTS.values(), ids=SCRIPTS)
def test_a_program_runs_as_a_script_does(judge, program):
    assert status(judge, program, prints("3\n4\n", "7\n")) == Status.ACCEPTED


NO_SCRIPTS = {
    "an exception after the output": ("print(7)\nraise ValueError", Status.RUNTIME_ERROR),
    "a name that nobody imported": ("print(reduce(max, [7]))", Status.RUNTIME_ERROR),
    "return outside of a function": ("print(7)\nreturn", Status.COMPILE_ERROR),
    "no output": ("7", Status.WRONG_ANSWER),
    "another process": ("import os\nos.fork()\nprint(7)", Status.RUNTIME_ERROR),
    "a file": ("open('x', 'w').write('x')\nprint(7)", Status.RUNTIME_ERROR),
    "too much memory": ("x = bytearray(700 << 20)\nprint(7)", Status.MEMORY_LIMIT),
    "too much output": ("while True: print('7' * 1000)", Status.OUTPUT_LIMIT),
    "forever": ("while True: pass", Status.TIME_LIMIT),
    "forever, deaf": (
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\nwhile True: pass",
        Status.TIME_LIMIT,
    ),
}


@pytest.mark.parametrize(("program", "expected"), NO_SCRIPTS.values(), ids=NO_SCRIPTS)
def test_what_a_failure_is_called(judge, program, expected):
    assert status(judge, program, prints("", "7\n"), Limits(cpu_s=0.5, wall_s=20, memory_mb=256)) == expected


def test_waiting_uses_no_cpu_and_ends_all_the_same(judge):
    limits = Limits(cpu_s=2, wall_s=0.5)
    assert status(judge, "import time\ntime.sleep(60)", prints("", ""), limits) == Status.TIME_LIMIT


def test_carriage_returns_reach_the_program(judge):
    assert status(judge, "print(len(input()))", prints("abc\r\n", "4")) == Status.ACCEPTED


LCB = {
    # accepted as a script, accepted by LiveCodeBench's harness
    "plain": ("print(int(input()) + int(input()))", True, True),
    "lines of stdin": ("import sys\nprint(sum(int(line) for line in sys.stdin))", True, False),
    "buffer.readline repeats": (
        "import sys\nb = sys.stdin.buffer\nprint(int(b.readline()) + int(b.readline()))",
        True,
        False,
    ),
    "stdout.buffer": ("import sys\nsys.stdout.buffer.write(b'%d' % (int(input()) + int(input())))", True, False),
    "os.write": ("import os\nos.write(1, b'7')", True, False),
    "open(0)": ("print(sum(map(int, open(0).read().split())))", True, False),
    "a global": ("n = 3\ndef f():\n    global n\n    n += 4\nf()\nprint(n)", True, False),
    "a guard at the end": (
        "def f():\n    print(int(input()) + int(input()))\nif __name__ == '__main__':\n    f()",
        True,
        True,
    ),
    "quit": ("print(7)\nquit()", True, False),
    "no import": ("print(reduce(max, [7]))", False, True),
    "return outside of a function": ("print(7)\nreturn", False, True),
    "reading twice": ("import sys\nsys.stdin.read()\nprint(sum(map(int, sys.stdin.read().split())))", False, True),
}


@pytest.mark.parametrize(("program", "as_script", "as_lcb"), LCB.values(), ids=LCB)
def test_where_the_harness_of_livecodebench_differs(judge, lcb, program, as_script, as_lcb):
    test = prints("3\n4\n", "7\n")
    assert (status(judge, program, test) == Status.ACCEPTED) is as_script
    assert (status(lcb, program, test) == Status.ACCEPTED) is as_lcb


DEEP: list = []
for _ in range(300):
    DEEP = [DEEP]
CALLS = {
    "a function": ("def f(a, b): return a + b", [1, 2], 3, True),
    "a method, imports given": (
        "class Solution:\n    def f(self, a: List[int]) -> int: return reduce(max, a)",
        [[1, 5]],
        5,
        True,
    ),
    "a name that the prefix has too": ("class Solution:\n    def count(self, a): return a", [1], 1, True),
    "a tuple is a list at the top": ("def f(): return (1, 2)", [], [1, 2], True),
    "a named tuple is, too": ("P = namedtuple('P', 'x y')\ndef f(): return P(1, 2)", [], [1, 2], True),
    "not below": ("def f(): return [(1, 2)]", [], [[1, 2]], False),
    "True is 1": ("def f(): return True", [], 1, True),
    "text is not a number": ("def f(): return '1'", [], 1, False),
    "large integers": ("def f(a): return a * a", [10**30], 10**60, True),
    "infinity": ("def f(): return float('inf')", [], float("inf"), True),
    "nan is not nan": ("def f(): return float('nan')", [], float("nan"), False),
    "no tolerance": ("def f(): return 0.1 + 0.2", [], 0.3, False),
    "a dictionary": ("def f(d): return {**d, 'b': [None]}", [{"a": 1}], {"a": 1, "b": [None]}, True),
    "integer keys are not text": ("def f(): return {1: 2}", [], {"1": 2}, False),
    "a set": ("def f(): return {1}", [], [1], False),
    "a generator": ("def f(): yield 1", [], [1], False),
    "an object that says yes": ("class E:\n    def __eq__(s, o): return True\ndef f(): return E()", [], 1, False),
    "a lying integer": (
        "class E(int):\n    def __eq__(s, o): return True\n    def __repr__(s): return '1'\n    def __add__(s, o): return 1\ndef f(): return E(2)",
        [],
        1,
        False,
    ),
    "output on the side": ("def f():\n    print('x' * 100000)\n    return 1", [], 1, True),
    "None": ("def f(): pass", [], None, True),
    "an argument that grows": ("def f(n, seen): seen += range(n); return len(seen)", [60000, []], 60000, True),
    "deep lists": ("def f(a): return a", [DEEP], DEEP, True),
    "much more than is expected": ("def f(): return list(range(300000))", [], [1], False),
}


@pytest.mark.parametrize(("program", "args", "expected", "is_right"), CALLS.values(), ids=CALLS)
def test_function_calls(judge, program, args, expected, is_right):
    name = "count" if "count" in program else "f"
    test = [{"call": name, "args": args, "expected": expected}]
    assert (status(judge, program, test) == Status.ACCEPTED) is is_right


ASSERTS = {
    "a call": ("def f(a): return sorted(a)", "assert f([2, 1]) == [1, 2]", True),
    "sets, tuples, complex numbers, bytes": (
        "def f(): return {1}, (2,), 1j, b'x'",
        "assert f() == ({1}, (2,), 1j, b'x')",
        True,
    ),
    "arguments changed in place": ("def f(a): a.sort()", "a = [2, 1]\nf(a)\nassert a == [1, 2]", True),
    "an expected exception": (
        "def f(): raise ValueError('x')",
        "try:\n    f()\nexcept ValueError as e:\n    assert str(e) == 'x'\nelse:\n    assert False",
        True,
    ),
    "generators": ("def f():\n    while True: yield 1", "g = f()\nassert [next(g), next(g)] == [1, 1]", True),
    "objects with attributes": (
        "class Node:\n    def __init__(self, v): self.v, self.n = v, None\ndef f(n): return n.v + n.n.v",
        "a = Node(1)\na.n = Node(2)\nassert f(a) == 3\nassert a.n.v == 2",
        True,
    ),
    "a type as an argument": ("def f(x, t): return isinstance(x, t)", "assert f(1, int) and not f(1, str)", True),
    "linked lists": (
        "class Solution:\n    def f(self, n: Optional[ListNode]): return ListNode(0, n)",
        "assert is_same_list(Solution().f(n=list_node([1, 2])), list_node([0, 1, 2]))",
        True,
    ),
    "trees": (
        "def f(t):\n    t.left, t.right = t.right, t.left\n    return t",
        "assert is_same_tree(f(tree_node([1, 2, 3, None, 4])), tree_node([1, 3, 2, None, None, None, 4]))",
        True,
    ),
    "a function called sum": ("def sum(a, b): return a + b", "assert sum(1, 2) == 3", True),
    "wrong": ("def f(a): return a", "assert f(1) == 2", False),
    "swallowed death": ("import os\ndef f(a): os._exit(0)", "try:\n    f(1)\nexcept BaseException:\n    pass", False),
    "an abs of its own": ("def abs(x): return 0\ndef f(a): return 5.0", "assert abs(f(1) - 1) < 1e-6", False),
}


@pytest.mark.parametrize(("program", "source", "is_right"), ASSERTS.values(), ids=ASSERTS)
def test_assertions(judge, program, source, is_right):
    assert (status(judge, program, [{"assert": source}]) == Status.ACCEPTED) is is_right


def test_a_test_that_asks_nothing_is_no_verdict(judge):
    with pytest.raises(programs.SandboxError, match="never calls the program"):
        status(judge, "def f(): pass", [{"assert": "if False:\n    f()"}])


def test_several_tests_and_the_early_end(judge):
    tests = programs.parse_tests([{"stdin": str(n), "stdout": str(min(n, 2))} for n in range(5)])
    program = "print(input())"
    assert [r.status for r in judge.judge(program, tests, LIMITS, stop_early=True)] == ["accepted"] * 3 + [
        "wrong_answer"
    ]
    assert len(judge.judge(program, tests, LIMITS, stop_early=False)) == 5


def test_what_a_program_says_last_is_told_in_whole_lines(judge):
    program = "raise ValueError('\\n'.join(['a' * 70] * 5))"
    (result,) = judge.judge(program, programs.parse_tests([{"stdin": "", "stdout": ""}]), LIMITS, stop_early=True)
    assert result.detail == f"exit 1 {'a' * 70}\n{'a' * 70}"
    (result,) = judge.judge(
        "raise ValueError('a' * 500)", programs.parse_tests([{"stdin": "", "stdout": ""}]), LIMITS, stop_early=True
    )
    assert result.detail == f"exit 1 {'a' * 160}"


def test_grades_by_all_by_fraction_and_by_status():
    good, bad = programs.Result(Status.ACCEPTED, "", 0.001), programs.Result(Status.TIME_LIMIT, "2 s", 2.0)
    rewards = {"accepted": 1.0, "time_limit": -0.5}
    for results, expected in (([good, good], (1.0, 1.0, 1.0)), ([good, bad], (0.0, 0.5, -0.5))):
        grades = [programs.make_grade(results, 2, kind, "namespaces") for kind in ("all", "fraction", rewards)]
        assert tuple(grade.reward for grade in grades) == expected
        assert {grade.verdict for grade in grades} == {"correct" if expected[0] else "wrong"}
    assert grades[0].detail == "time_limit in test 1: 2 s"
    with pytest.raises(programs.SandboxError, match="0 of 2 tests were run"):
        programs.make_grade([], 2, "all", "namespaces")


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ([], "at least one test"),
        ("x", "at least one test"),
        ([{"stdin": "", "stdout": ""}, {"stdin": ""}], r"tests\[1\]: should have the keys stdin, stdout"),
        ([{"stdin": 1, "stdout": ""}], "are text"),
        ([{"call": "f", "args": 1, "expected": 1}], "args and any_of are lists"),
        ([{"assert": "assert f("}], "do not compile"),
        ([{"assert": "assert True"}], "use no name that the program could define"),
    ],
)
def test_tests_that_are_none(tests, message):
    with pytest.raises(ValueError, match=message):
        programs.parse_tests(tests)


TACO = {"inputs": ["1\n", ["2", "3"]], "outputs": ["1\n", ["2", "3"]]}
LIVE = [{"input": "1\n[2]", "output": "[3]", "testtype": "functional", "metadata": {"func_name": "f"}}]
LAYOUTS = {
    "TACO": (TACO, [{"stdin": "1\n", "stdout": "1\n"}, {"stdin": "2\n3", "stdout": "2\n3"}]),
    "APPS, calls": (
        {"fn_name": "f", "inputs": [[1]], "outputs": [[False]]},
        [{"call": "f", "args": [1], "any_of": [[False], False]}],
    ),
    "LiveCodeBench, calls": (LIVE, [{"call": "f", "args": [1, [2]], "expected": [3]}]),
    "LiveCodeBench, text": ([{"input": "1", "output": "2", "testtype": "stdin"}], [{"stdin": "1", "stdout": "2"}]),
    "LiveCodeBench, a row": (
        {
            "public_test_cases": '[{"input": "1", "output": "2", "testtype": "functional"}]',
            # json.dumps([{"input": "3", ...}]), pickled, zlib, base64
            "private_test_cases": "PACKED",
            "metadata": '{"func_name": "f"}',
        },
        [{"call": "f", "args": [1], "expected": 2}, {"call": "f", "args": [3], "expected": 4}],
    ),
    "PrimeIntellect": (
        [
            {"type": "function_call", "fn_name": "f", "input": [1], "output": [2]},
            {"type": "stdin_stdout", "input": "1", "output": "2"},
        ],
        [{"call": "f", "args": [1], "any_of": [[2], 2]}, {"stdin": "1", "stdout": "2"}],
    ),
    "MBPP": (
        {"test_list": ["assert f(1) == 2"], "test_setup_code": "", "test_imports": ["import math"]},
        [{"assert": "\nimport math\nassert f(1) == 2"}],
    ),
    "ours": ([{"call": "f", "args": [], "expected": 1}], [{"call": "f", "args": [], "expected": 1}]),
}


@pytest.mark.parametrize(("layout", "tests"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_data_sets(layout, tests):
    if isinstance(layout, dict) and layout.get("private_test_cases") == "PACKED":
        layout = {**layout, "private_test_cases": packed('[{"input": "3", "output": "4", "testtype": "functional"}]')}
    assert layouts.read_tests(layout) == tests
    assert layouts.read_tests(json.dumps(layout)) == tests
    programs.parse_tests(tests)


def packed(value):
    """A value as LiveCodeBench packs its private tests."""
    import base64
    import pickle
    import zlib

    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def test_a_pickle_that_is_more_than_text_is_refused():
    row = {"public_test_cases": "[]", "private_test_cases": packed(print)}
    with pytest.raises(ValueError, match=r"its pickle has .*GLOBAL .*; it may contain only a string"):
        layouts.read_tests(row)


def hostile_pickles(tmp_path):
    """Pickles that would do something if they were loaded, and some that are not strings."""
    import collections
    import os
    import pickle

    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    return {
        **{f"os.system, protocol {n}": pickle.dumps(Runs(), n) for n in range(6)},
        "string, then os.system": pickle.dumps("[]")[:-1] + b"0cposix\nsystem\n(S'touch x'\ntR.",
        "os.system, then a string": b"cposix\nsystem\n(S'touch x'\ntR0" + pickle.dumps("[]")[11:],
        "builtins.eval": b"cbuiltins\neval\n(V1+1\ntR.",
        "a class": pickle.dumps(collections.OrderedDict),
        "a list": pickle.dumps(["[]"]),
        "a number": pickle.dumps(3),
        "bytes": pickle.dumps(b"[]"),
        "two strings": b"V1\nV2\n.",
        "nothing": b".",
        "no end": pickle.dumps("[]")[:-1],
        "a persistent id": b"Psecret\n.",
        "not a pickle": b"[1, 2]",
        "empty": b"",
    }


def test_hostile_pickles_are_refused_and_run_nothing(tmp_path):
    import base64
    import zlib

    for name, pickled in hostile_pickles(tmp_path).items():
        packed = base64.b64encode(zlib.compress(pickled)).decode()
        with pytest.raises(ValueError, match="is refused"):
            raise AssertionError(f"{name}: {layouts.unpack(packed)!r}")
    assert not (tmp_path / "ran").exists()


def test_packed_text_comes_back_and_damage_is_reported(monkeypatch):
    for text in ("", "[]", json.dumps([{"input": "é\n", "output": "\u2028"}]), "x" * 100_000):
        assert layouts.unpack(packed(text)) == text
    text = packed("some tests " * 50)
    with pytest.raises(ValueError, match="not base64"):
        layouts.unpack(text[:40] + "!" + text[41:])
    with pytest.raises(ValueError, match="truncated zlib stream"):
        layouts.unpack(text[:40])
    monkeypatch.setattr(layouts, "MAX_UNPACKED", 100)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        layouts.unpack(text)


def test_an_unknown_layout_says_so():
    with pytest.raises(ValueError, match="the tests have an unknown layout"):
        layouts.read_tests({"question": "?"})


def test_helpers_of_a_humaneval_prompt_are_not_the_programs():
    row = {
        "prompt": "import math\n\ndef poly(x):\n    return math.floor(x)\n\ndef solve(x):\n    '''text'''\n",
        "test": "def check(candidate):\n    assert poly(candidate(1.5)) == 1\n",
        "entry_point": "solve",
    }
    (test,) = programs.parse_tests(layouts.read_tests(row))
    assert test.remote == ("solve",)
