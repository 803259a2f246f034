r"""Grades rows of a file, to find out why a reward is what it is.

python -m oapl_jax grade IN.jsonl OUT.jsonl [--config C.yaml]

A row of IN is ``{"id", "kind": "math", "gold", "response", "prompt"}`` or ``{"id", "kind": "code", "program" or
"response", "tests": [{"stdin", "stdout"} | {"call", "args", "expected"} | {"assert"}], "limits": {"cpu_s", "wall_s",
"memory_mb"}}``. ``prompt``, ``limits`` and each of its keys are optional. OUT has a row for each row of IN, in the same
order: ``{"id", "status", "reward", "detail", "level", "cpu_ms"}``; the ``detail`` of a math row is the rule that decided.
The options come from the section ``reward`` of C, which can be the config of a run; functions of yours are not run.

Exit codes: 0 all rows have a verdict, 1 some verdicts are invalid, 2 the rows or the config are wrong.
"""

import argparse
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from oapl_jax.config import config_file
from oapl_jax.config.reward import RewardConfig
from oapl_jax.io.progress_bar import ProgressBar
from oapl_jax.io.terminal import say
from oapl_jax.rewards import tasks
from oapl_jax.rewards.code import layouts, programs
from oapl_jax.rewards.grader import compose
from oapl_jax.rewards.pool import GraderPool
from oapl_jax.types import Verdict
from oapl_jax.untrusted import reading

ROWS_AT_ONCE = 256
"""Rows in memory per worker."""
KEYS = {
    "math": ({"id", "kind", "gold", "response"}, {"prompt"}),
    "code": ({"id", "kind", "tests"}, {"program", "response", "limits"}),
}
LIMITS = {"cpu_s", "wall_s", "memory_mb"}


def grade_file(source: pathlib.Path, target: pathlib.Path, reward: RewardConfig) -> dict[str, int]:
    """Grades the rows of a file, writes the grades into another, and returns the number of each verdict.

    Raises:
        ValueError: a line is not a row; the message names it. Or both files are one.
    """
    if source.exists() and target.exists() and target.samefile(source):
        raise ValueError(f"{str(target)!r} has the rows, and would be overwritten; choose another file for the grades")
    counts = dict.fromkeys(Verdict, 0)
    # All rows are checked before the first is graded.
    kinds = [row["kind"] for row, _ in _rows(source, reward)]
    setup = tasks.make_setup(reward, tuple(sorted(set(kinds))))
    rows, done = _rows(source, reward), 0
    with (
        GraderPool(reward.workers, reward.retries, setup) as pool,
        target.open("w", encoding="utf-8") as out,
        ProgressBar(len(kinds), stream=sys.stderr, unit="row") as bar,
    ):
        while chunk := list(itertools.islice(rows, ROWS_AT_ONCE * reward.workers)):
            graded = pool.grade([task for _, task in chunk], lambda count, done=done: bar.update(done + count, {}))
            for (row, _), grade in zip(chunk, graded, strict=True):
                weight = reward.functions.get(row["kind"], 1.0)
                total = compose(reward, [weight], [grade], row.get("response", ""))
                counts[total.verdict] += 1
                result = {"id": row["id"], "status": total.verdict.value}
                result["reward"] = None if math.isnan(total.reward) else total.reward
                result |= {"detail": total.detail, "level": total.level, "cpu_ms": total.cpu_ms}
                out.write(json.dumps(result) + "\n")
            done += len(chunk)
    return {verdict.value: count for verdict, count in counts.items()}


def _rows(source: pathlib.Path, reward: RewardConfig) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yields each row with its task."""
    for number, line in enumerate(reading.read_text(source).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
                yield row, _task(row, reward)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{source} line {number}: {error}") from error


def _task(row: Any, reward: RewardConfig) -> dict[str, Any]:
    if not isinstance(row, dict) or row.get("kind") not in KEYS:
        raise ValueError(f"a row is an object whose 'kind' is math or code, but this is {str(row)[:100]!r}")
    needed, optional = KEYS[row["kind"]]
    missing, unknown = needed - set(row), set(row) - needed - optional
    if missing or unknown:
        raise ValueError(f"missing keys {sorted(missing)}, unknown keys {sorted(unknown)}")
    if row["kind"] == "math":
        response, prompt = row["response"], row.get("prompt", "")
        if not isinstance(response, str) or not isinstance(prompt, str):
            raise ValueError("response and prompt are text")
        return tasks.math_task(reward, str(row["gold"]), response, prompt)
    sources = {key: row[key] for key in ("program", "response") if key in row}
    limits = row.get("limits") or {}
    if len(sources) != 1:
        raise ValueError("give either program or response")
    if set(limits) - LIMITS or not all(isinstance(value, (int, float)) and value > 0 for value in limits.values()):
        raise ValueError(f"limits: should be positive numbers for {', '.join(sorted(LIMITS))}, but is {limits}")
    num_tests = len(programs.parse_tests(layouts.read_tests(row["tests"])))
    return tasks.code_task(reward, json.dumps(row["tests"]), num_tests, limits, **sources)


def main(argv: list[str]) -> int:
    """Grades a file; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="oapl-jax grade", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="IN.jsonl", type=pathlib.Path)
    parser.add_argument("target", metavar="OUT.jsonl", type=pathlib.Path)
    parser.add_argument("--config", help="YAML file with a section 'reward'")
    arguments = parser.parse_args(argv)
    reward = config_file.load_reward(arguments.config) if arguments.config else RewardConfig()
    if own := [name for name in reward.functions if name not in KEYS]:
        say(f"not run: {', '.join(own)}; this command grades with math and code only", sys.stderr)
    counts = grade_file(arguments.source, arguments.target, reward)
    say(", ".join(f"{count:,} {verdict}" for verdict, count in counts.items()))
    return 1 if counts["invalid"] else 0
