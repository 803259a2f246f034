"""CPU time per verdict of the graders, in the processes that training uses.

    python benchmarks/rewards.py --json [--verdicts 20000]

Everything is CPU time of the grading worker, its sandbox and the programs together, over ``--seconds`` of work a
figure on warm workers. ``cpu_ms_per_test``: a small program on text tests, 15 a program; ``cpu_ms_per_call``: a
function on call tests, each of which takes a second child; ``tests_per_s`` is what two idle cores would do with text
tests (2000 / cpu_ms_per_test). ``cold_python_ms`` is a bare ``python -I -S`` per test, for
comparison. ``math_*``: answers to golds of many forms. ``growth``: memory and descriptors of the worker and its
sandbox over ``--verdicts`` verdicts, each worker living as long as in training.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time

from oapl_jax.config.reward import RewardConfig
from oapl_jax.rewards import tasks
from oapl_jax.rewards.code.programs import Judge, Limits, Settings, parse_tests
from oapl_jax.rewards.worker import TaskGrader

PROGRAM = "n = int(input())\nprint(sum(map(int, input().split())))\n"
TESTS = [{"stdin": "3\n4 5 6\n", "stdout": "15\n"}] * 15
FUNCTION = "def f(numbers): return sum(numbers)\n"
CALLS = [{"call": "f", "args": [[4, 5, 6]], "expected": 15}] * 15
GOLDS = (
    "72",
    r"\frac{1}{2}",
    "x^2+2x+1",
    r"\left( 3, \frac{\pi}{2} \right)",
    r"2\sqrt{3}",
    "[0,1)",
    "10",
    r"\text{east}",
)
ANSWERS = ("{}", r"\frac{{{}}}{{1}}", "{}+0", "{}.0", "-{}", "x+{}", r"\sqrt{{{}}}", "({}, 1)")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seconds", type=float, default=5.0, help="of work for each figure")
    parser.add_argument("--verdicts", type=int, default=2000, help="of the memory measurement; 0: none")
    arguments = parser.parse_args()
    figures = {
        **code_figures(arguments.seconds),
        **math_figures(arguments.seconds),
        "growth": growth(arguments.verdicts) if arguments.verdicts else None,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "load": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(figures) if arguments.json else "\n".join(f"{key:<20} {value}" for key, value in figures.items()))


def code_figures(seconds: float) -> dict:
    judge = Judge(Settings())
    per_test, per_call = (cpu_ms(judge, *kind, seconds) for kind in ((PROGRAM, TESTS), (FUNCTION, CALLS)))
    level = judge.level
    judge.close()
    return {
        "cpu_ms_per_test": round(per_test, 3),
        "cpu_ms_per_call": round(per_call, 3),
        "tests_per_s": round(2000 / per_test),
        "cold_python_ms": round(1000 * cold_python(), 3),
        "level": level,
    }


def cpu_ms(judge: Judge, program: str, layout: list[dict], seconds: float) -> float:
    """CPU milliseconds of a test: of this process as the grader, of the sandboxes, and of the children."""
    tests = parse_tests(layout)

    def run() -> float:
        before = time.process_time()
        results = judge.judge(program, tests, Limits(), stop_early=True)
        assert len(results) == len(tests)
        return time.process_time() - before + sum(result.cpu_s for result in results)

    run()
    drivers = worker_cpu(judge)
    spent = repeat(run, seconds)
    return 1000 * (sum(spent) + worker_cpu(judge) - drivers) / (len(spent) * len(tests))


def worker_cpu(judge: Judge) -> float:
    """CPU seconds of the sandboxes' trusted processes, without the children that they have waited for."""
    ticks = 0
    for pid in [pid for sandbox in judge._sandboxes for pid in tree(sandbox.process.pid)]:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def cold_python(times: int = 20) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(times):
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", PROGRAM], input=b"3\n4 5 6\n", capture_output=True, check=True
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / times


def math_figures(seconds: float) -> dict:
    reward = RewardConfig()
    grader = TaskGrader(tasks.make_setup(reward, ("math",)))
    pairs = [(gold, form.format(gold)) for form in ANSWERS for gold in GOLDS]
    for gold, _ in pairs[: len(GOLDS)]:
        grader.grade(tasks.math_task(reward, gold, rf"\boxed{{{gold}+1}}"))
    spent: list[float] = []
    stop = time.process_time() + seconds
    while time.process_time() < stop or len(spent) < len(pairs):
        gold, answer = pairs[len(spent) % len(pairs)]
        answer = f"{answer}+{len(spent) // len(pairs)}"  # so that the cache never hits
        spent.append(grader.grade(tasks.math_task(reward, gold, rf"\boxed{{{answer}}}"))[0].cpu_ms)
    quantiles = statistics.quantiles(spent, n=100)
    return {"math_p50_ms": round(quantiles[49], 3), "math_p99_ms": round(quantiles[98], 3), "math_verdicts": len(spent)}


def growth(verdicts: int) -> dict:
    """Memory (MiB) and descriptors after a hundredth of the verdicts and after all: half programs, half answers."""
    reward = RewardConfig.model_validate({"functions": {"math": 1.0, "code": 1.0}})
    grader = TaskGrader(tasks.make_setup(reward, ("math", "code")))
    test = json.dumps(TESTS[:1])
    samples = []
    for number in range(verdicts):
        if number % 2:
            task = tasks.code_task(reward, test, 1, program=f"{PROGRAM}# {number}")
        else:
            task = tasks.math_task(reward, "1/3", rf"\boxed{{\frac{{{number}}}{{{3 * number + 1}}}}}")
        (grade,) = grader.grade(task)
        assert grade.verdict != "invalid", grade
        if number + 1 in (max(1, verdicts // 100), verdicts):
            samples.append(size(os.getpid()))
    sandbox = [size(pid)[0] for pid in tree(grader._judge._sandbox(0).process.pid)]
    grader._judge.close()
    names = ("memory_mb", "descriptors")
    result = {
        f"{name}_{when}": value
        for when, sample in zip(("early", "late"), samples, strict=True)
        for name, value in zip(names, sample, strict=True)
    }
    return {"verdicts": verdicts, **result, "sandbox_memory_mb": round(sum(sandbox), 1)}


def size(pid: int) -> tuple[float, int]:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    kilobytes = int(status.split("VmRSS:")[1].split()[0])
    return round(kilobytes / 1024, 1), len(list(pathlib.Path(f"/proc/{pid}/fd").iterdir()))


def tree(root: int) -> list[int]:
    """A process and its descendants."""
    found = [root]
    for pid in found:
        found += map(int, pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return found


def repeat(run, seconds: float) -> list[float]:
    spent: list[float] = []
    while sum(spent) < seconds:
        spent.append(run())
    return spent


if __name__ == "__main__":
    main()
