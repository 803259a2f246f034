"""The report of a long run: time and memory of making it, and time in which Chromium draws it.

    python benchmarks/report.py --json [--steps 100000] [--rollouts 1000000] [--keep FOLDER]

The run is made up: metrics of every step, a rollout log with short texts in files of 32 groups of 10, a batch record, an
evaluation every thousandth of the run. ``cpu_seconds`` and ``peak_rss_mib`` are those of a process that writes the report;
``draw_seconds`` is the time from opening the page to its first part drawn, null without Chromium.
"""

import argparse
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

from oapl_jax.io.json_lines import LineFile
from oapl_jax.io.metrics import MetricsWriter
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, RolloutGroup, Verdict

GROUP, FILE, SYNC_EVERY, TOKENS, PROMPTS = 10, 32, 50, 20, 200
NUM_METRICS = 40
BROWSER = ("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--timeout=60000")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--rollouts", type=int, default=1_000_000)
    parser.add_argument("--keep", type=pathlib.Path, help="folder that keeps the run; one that is there is used again")
    parser.add_argument("--write", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write(arguments.write)
        return
    with tempfile.TemporaryDirectory() as folder:
        run = arguments.keep or pathlib.Path(folder, "run")
        if not run.exists():
            make_run(run, arguments.steps, arguments.rollouts)
        done = subprocess.run([sys.executable, __file__, "--write", run], check=True, stdout=subprocess.PIPE, text=True)
        figures = json.loads(done.stdout) | {
            "bytes": (run / "report.html").stat().st_size,
            "draw_seconds": draw_seconds(run / "report.html"),
            "load": round(os.getloadavg()[0], 1),
        }
    print(json.dumps(figures) if arguments.json else "\n".join(f"{key:<20} {value}" for key, value in figures.items()))


def write(run: pathlib.Path) -> None:
    """In a process of its own: writes the report, and prints what that took."""
    from oapl_jax.report.report import write_report

    wall, cpu = time.perf_counter(), time.process_time()
    write_report(run)
    figures = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    rounded = {key: round(value, 1) for key, value in figures.items()}
    print(json.dumps(rounded | {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))


def draw_seconds(page: pathlib.Path) -> float | None:
    if (browser := shutil.which("chromium")) is None:
        return None
    done = subprocess.run([browser, *BROWSER, page.as_uri()], capture_output=True, text=True, check=True)
    found = re.search(r'data-drawn="(\d+)"', done.stdout)
    return int(found[1]) / 1000 if found else None


def make_run(run: pathlib.Path, num_steps: int, num_rollouts: int) -> None:
    rng = np.random.default_rng(0)
    run.mkdir(parents=True)
    evaluations, batches = (LineFile(run / f"{name}.jsonl") for name in ("evaluations", "batches"))
    with MetricsWriter(run) as writer:
        for step in range(1, num_steps + 1):
            values = rng.normal(step / num_steps, 0.1, NUM_METRICS)
            line = {f"learner/metric_{i}": value for i, value in enumerate(values)} | {"rollouts/reward": values[0]}
            writer.write(step, line | ({"sync/seconds": 0.1} if step % SYNC_EVERY == 0 else {}))
            if step % max(1, num_steps // 1000) == 0:
                correct = rng.binomial(4, 0.2 + 0.6 * step / num_steps, PROMPTS).tolist()
                ids = [f"made/test/{i}" for i in range(PROMPTS)]
                counts = {"prompts": ids, "graded": [4] * PROMPTS, "correct": correct}
                evaluations.append({"step": step, **counts})
    num_versions = max(1, num_steps // SYNC_EVERY)
    per_version = max(1, num_rollouts // GROUP // num_versions)
    log = RolloutLog(run / "rollouts")
    for version in range(num_versions):
        groups = [make_group(rng, version, i, version / num_versions) for i in range(per_version)]
        for start in range(0, per_version, FILE):
            log.append(groups[start : start + FILE])
        for i, group in enumerate(groups):
            step = version * SYNC_EVERY + 1 + i * SYNC_EVERY // per_version
            row = {"step": step, "policy_version": version, "groups": [group.id], "digests": ["0" * 16]}
            batches.append(row)


def make_group(rng: np.random.Generator, version: int, index: int, done: float) -> RolloutGroup:
    tokens, logprobs = rng.integers(0, 1000, TOKENS, np.int32), -rng.random(TOKENS, np.float32)
    rollout = Rollout(tokens, logprobs, FinishReason.STOP)
    is_right = rng.random(GROUP) < 0.2 + 0.6 * done
    graded = [
        GradedRollout(rollout, f"the answer is {i}, <b>of</b> course", Grade(Verdict.CORRECT if right else Verdict.WRONG, float(right), "" if right else f"{i} is not 7"), 0.1)
        for i, right in enumerate(is_right)
    ]  # fmt: skip
    prompt = Prompt(f"made/train/{version * 100 + index}", tokens[:8], f"What is {index} less {version}?", "7")
    return RolloutGroup(index, version, prompt, tuple(graded), 0.5)


if __name__ == "__main__":
    main()
