"""Programs whose verdicts are known, from public data sets in all their layouts.

A sample of the large data sets runs by default. All of them run (in ten minutes) with

    OAPL_JAX_CORPORA=all python -m pytest tests/rewards/test_corpora.py
"""

import gzip
import json
import os

import pytest

from oapl_jax.config.reward import RewardConfig
from oapl_jax.rewards import tasks
from oapl_jax.rewards.code import layouts
from oapl_jax.rewards.code.programs import Judge, Limits, Settings, Status, parse_tests
from oapl_jax.rewards.pool import GraderPool

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("sandboxed"), pytest.mark.timeout(3000)]

IS_FULL = os.environ.get("OAPL_JAX_CORPORA") == "all"
PACKAGES = ["numpy", "sortedcontainers"]
PLAIN = """
def plain(x):
    if isinstance(x, (int, float, str)) or x is None:
        return x
    return [plain(y) for y in x]
"""
"""The expected values of QuixBugs are JSON, so its generators and tuples have become lists."""
SLOW_EVEN_IF_RIGHT = {"knapsack": 10**5, "levenshtein": 10}
"""QuixBugs functions whose right versions take minutes on some tests (its own suite leaves them out too): those where
the first argument is larger, or longer, are left out."""


DIFFERENT_LINES = {
    "guessingcircle/submissions/accepted/per_n2_maybe_correct.py",
    "guessingcircle/submissions/time_limit_exceeded/per_n3_v1.py",
}
"""Print on one line what is expected on several: right for the contest's validator, not by LiveCodeBench's rules."""


def sample(rows, every):
    rows = list(rows)
    return rows if IS_FULL else rows[::every]


def read_jsonl(path):
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def code(shared_data):
    return shared_data / "code"


@pytest.fixture(scope="module")
def outcomes():
    """Judges (name, program, tests) triples; returns name -> status."""
    reward = RewardConfig.model_validate({"functions": {"code": 1.0}, "packages": PACKAGES})
    pool = GraderPool(2, 2, tasks.make_setup(reward, ("code",)))

    def run(cases, cpu_s=6.0):
        limits = {"cpu_s": cpu_s, "wall_s": 20 * cpu_s}
        made = []
        for _, program, layout in cases:
            tests = layouts.read_tests(layout)
            made.append(tasks.code_task(reward, json.dumps(tests), len(tests), limits, program=program))
        grades = pool.grade(made)
        assert {grade.level for grade in grades} == {"namespaces"}, grades
        return {
            case[0]: "accepted" if grade.reward == 1 else grade.detail.split(" ")[0]
            for case, grade in zip(cases, grades, strict=True)
        }

    with pool:
        yield run


def others(outcome, *allowed):
    return {name: status for name, status in outcome.items() if status not in allowed}


def test_humaneval(code, outcomes):
    rows = read_jsonl(code / "humaneval/HumanEval.jsonl.gz")
    assert len(rows) == 164
    cases = [(row["task_id"], row["prompt"] + row["canonical_solution"], row) for row in rows]
    assert others(outcomes(cases), "accepted") == {}


def test_humanevalpack_bugs_are_found(code, outcomes):
    rows = read_jsonl(code / "humaneval/humanevalpack_python.jsonl")
    assert len(rows) == 164
    cases = [(row["task_id"], row["prompt"] + row["buggy_solution"], row) for row in rows]
    rejected = outcomes(cases, cpu_s=1.0)
    assert len(others(rejected, "accepted")) == 164


@pytest.mark.parametrize(("name", "num_rows"), [("mbpp.jsonl", 974), ("sanitized-mbpp.json", 427)])
def test_mbpp(code, outcomes, name, num_rows):
    path = code / "mbpp" / name
    rows = read_jsonl(path) if path.suffix == ".jsonl" else json.loads(path.read_text())
    assert len(rows) == num_rows
    assert others(outcomes([(row["task_id"], row["code"], row) for row in sample(rows, 8)]), "accepted") == {}


def test_leetcode(code, outcomes):
    rows = json.loads((code / "leetcode/train.json").read_text())
    assert len(rows) == 1889
    cases = [(number, row["solutions"], row["tests"]) for number, row in enumerate(rows)]
    assert others(outcomes(sample(cases, 12)), "accepted") == {}


def test_submissions_to_contests(code, outcomes):
    """Right programs are accepted and wrong ones have their known status, but for two whose own judge is lenient."""
    wanted = {"correct": "accepted", "wrong": "wrong_answer", "timeout": "time_limit", "crash": "runtime_error"}
    cases, num_seen = {verdict: [] for verdict in wanted}, 0
    for problem in read_jsonl(code / "stdin_stdout_problems.jsonl"):
        tests = [{"stdin": test["input"], "stdout": test["output"]} for test in problem["tests"]]
        if problem["validator_flags"]:
            tests = [{**test, "tolerance": float(problem["validator_flags"].split()[-1])} for test in tests]
        for submission in problem["submissions"]:
            num_seen += 1
            if not IS_FULL and submission["verdict"] == "correct" and submission["max_seconds"] > 0.15:
                continue
            cases[submission["verdict"]].append((submission["file"], submission["code"], tests))
    assert num_seen == 57
    assert [len(cases[verdict]) for verdict in wanted] == [34 if IS_FULL else 25, 15, 7, 1]
    for verdict, status in wanted.items():
        seconds = {"timeout": 6.0 if IS_FULL else 1.0, "correct": 12.0}.get(verdict, 6.0)
        failed = others(outcomes(cases[verdict], cpu_s=seconds), status)
        if verdict == "timeout":  # one of them needs more memory, too, when it is given the time
            failed = {name: status for name, status in failed.items() if status != "memory_limit"}
        assert failed == {name: "wrong_answer" for name in failed if name in DIFFERENT_LINES}


def test_quixbugs(code, outcomes):
    rows = read_jsonl(code / "quixbugs.jsonl")
    assert len(rows) == 31
    for row in rows:
        row["tests"] = [test for test in row["tests"] if is_quick(row["fn"], test["args"][0])]
    for version, seconds in (("correct", 6.0), ("buggy", 1.0)):
        cases = [
            (row["fn"], row[version], [{"assert": PLAIN + quixbugs_assertion(row["fn"], t)} for t in row["tests"]])
            for row in rows
        ]
        outcome = outcomes(cases, cpu_s=seconds)
        accepted = set(outcome) - set(others(outcome, "accepted"))
        assert accepted == ({row["fn"] for row in rows} if version == "correct" else set())


def is_quick(function, first):
    most = SLOW_EVEN_IF_RIGHT.get(function)
    return most is None or (first if isinstance(first, int) else len(first)) <= most


def quixbugs_assertion(function, test):
    call = f"{function}(*{test['args']!r})"
    if function == "sqrt":  # its second argument is the tolerance
        return f"assert abs({call} - {test['expected']!r}) <= {test['args'][1]!r}"
    return f"assert plain({call}) == {test['expected']!r}"


LABELS = {Status.ACCEPTED: "True", Status.WRONG_ANSWER: "False", Status.COMPILE_ERROR: "-2"}


def test_apps_labels(code):
    """83 generated programs labelled True, False, -1 (a test crashed or was too slow) or -2 (does not compile)."""
    judge, found, num_seen = Judge(Settings(packages=("numpy",))), {}, 0
    for problem in sorted((code / "apps_samples/APPS/train").iterdir()):
        tests = parse_tests(layouts.read_tests((problem / "input_output.json").read_text()))
        items = list(enumerate(json.loads((problem / "gen_solutions.json").read_text())))
        num_seen += len(items)
        for number, item in sample(items, 2):
            results = judge.judge(item["code"], tests, Limits(cpu_s=0.5, wall_s=20), stop_early=False)
            label = min(
                (LABELS.get(result.status, "-1") for result in results), key=["-2", "-1", "False", "True"].index
            )
            found[problem.name, number] = label, str(item["result"])
    judge.close()
    assert num_seen == 83
    assert {name: pair for name, pair in found.items() if pair[0] != pair[1]} == {
        # `return` outside of a function: no Python, but their harness wraps the program in one.
        ("2287", 2): ("-2", "-1"),
        # An exception at the top of the module: they call it a compile error.
        ("4184", 14): ("-1", "-2"),
    }
