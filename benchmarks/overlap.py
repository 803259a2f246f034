"""What sampling and training at the same time saves: a detached run on two cores beside a serial run on one.

    python benchmarks/overlap.py --json

``serial`` is the on-policy limit of the same config in one process on one core: with ``window.sync_every=1`` the sampler
has nothing to do while the learner trains, and the learner nothing while it samples. ``overlapped`` is a trainer on the
first core and ``python -m oapl_jax sample`` on the second, with windows of several steps; the sampler lags, publishing
and reading policies included. The first window, in which programs are compiled, is not counted.

The roles are balanced where the serial run samples for half of its time (``sampling_share``): so it is with the default
config and ``OVERRIDES``: one group in flight, two tokens a call, 256 rollouts a step.

* ``speedup``: steps a second of the second over those of the first; 2 where the roles are balanced and nothing is lost.
* ``learner_idle``, ``sampler_idle``: shares of the time of the overlapped run.

All are of the repetition with the median speedup.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from oapl_jax.io.metrics import METRICS_FILE, read_metrics
from sampler import ROOT, machine

OVERRIDES = ["sampler.groups_in_flight=1", "sampler.decode_steps=2", "learner.batch_rollouts=256"]
DEADLINE = 1800
"""Seconds for one run."""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--config", default="configs/quickstart.yaml", help="of oapl_jax.train")
    parser.add_argument("--steps", type=int, default=60, help="learner steps of each run")
    parser.add_argument("--window", type=int, default=20, help="window.sync_every of the overlapped run")
    parser.add_argument("--repeats", type=int, default=3, help="how often both runs are made")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=OVERRIDES,
        metavar="section.key=value",
        help=f"of both runs; {' '.join(OVERRIDES)}",
    )
    arguments = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        parser.error("needs two cores")
    common = [f"run.steps={arguments.steps}", "evaluation.every=0", "evaluation.final_samples=1", *arguments.overrides]
    results = [compare(arguments, common, cores) for _ in range(arguments.repeats)]
    results.sort(key=lambda result: result["speedup"])
    result = results[len(results) // 2] | {"speedups": [result["speedup"] for result in results], "machine": machine(1)}
    if arguments.json:
        print(json.dumps(result, indent=2))


def compare(arguments: argparse.Namespace, common: list[str], cores: list[int]) -> dict[str, Any]:
    """Makes both runs."""
    with tempfile.TemporaryDirectory(prefix="oapl-overlap-") as folder:
        serial = pathlib.Path(folder, "serial")
        finish(train(arguments.config, serial, cores[0], [*common, "window.sync_every=1"]))
        overlapped = pathlib.Path(folder, "overlapped")
        windows = [f"window.sync_every={arguments.window}", "mode=detached"]
        trainer = train(arguments.config, overlapped, cores[0], [*common, *windows])
        sampler = start(["oapl_jax", "sample", "--run", str(overlapped)], cores[1])
        finish(trainer, sampler)
        runs = {"serial": rates(serial, arguments.window), "overlapped": rates(overlapped, arguments.window)}
    return {
        "speedup": runs["overlapped"]["steps_per_second"] / runs["serial"]["steps_per_second"],
        "learner_idle": runs["overlapped"]["learner_idle"],
        "sampler_idle": runs["overlapped"]["sampler_idle"],
        "sampling_share": runs["serial"]["learner_idle"],
        **runs,
    }


def train(config: str, run_dir: pathlib.Path, core: int, overrides: list[str]) -> subprocess.Popen[str]:
    """A trainer on one core."""
    return start(["oapl_jax.train", "--config", config, f"run.dir={run_dir}", *overrides], core)


def start(words: list[str], core: int | None) -> subprocess.Popen[str]:
    """A command of the package on one core (None: on all), with one thread where libraries ask."""
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, [core]),
    )


def finish(*processes: subprocess.Popen[str]) -> None:
    """Waits for the processes, the first one first.

    Raises:
        RuntimeError: one fails; with the end of what it said.
    """
    try:
        for process in processes:
            output, _ = process.communicate(timeout=DEADLINE)
            if process.returncode:
                raise RuntimeError(
                    f"{' '.join(map(str, process.args))}: exit code {process.returncode}\n{output[-3000:]}"
                )
    finally:
        for process in processes:
            process.kill()


def rates(run_dir: pathlib.Path, first: int) -> dict[str, Any]:
    """Steps a second and idle shares after the first steps, in which programs are compiled."""
    lines = [line for line in read_metrics(run_dir / METRICS_FILE) if line["step"] > first]
    seconds = sum(line["learner/seconds"] for line in lines)
    return {
        "steps_per_second": len(lines) / seconds,
        "learner_idle": sum(line["learner/wait_seconds"] for line in lines) / seconds,
        "sampler_idle": min(1.0, sum(line["sampler/idle_seconds"] for line in lines) / seconds),
        "measured_steps": len(lines),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
