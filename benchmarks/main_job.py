"""How fast an online run is: a run in a temporary run directory, then one JSON object.

    PYTHONPATH=. python benchmarks/main_job.py --config configs/quickstart.yaml run.steps=60 window.sync_every=20

Steps of the first window hold the compilations and are not measured. Evaluation in the course of
training is off unless an override turns it on: the sampler fills the buffer while it goes on.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import statistics
import sys
import tempfile
import threading
from typing import Any

import jax

from oapl_jax import train
from oapl_jax.build.checks import CHECKS
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.io.console import ExitCode
from oapl_jax.io.metrics import METRICS_FILE, read_metrics
from oapl_jax.types import Metrics

POLL_SECONDS = 0.02


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of oapl_jax.train")
    parser.add_argument("--json", type=pathlib.Path, help="also write the object to this file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args(argv)
    try:
        result = measure(arguments.config, ["evaluation.every=0", *arguments.overrides])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(ExitCode.USAGE) from None
    text = json.dumps(result, indent=2)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)


def measure(path: str, overrides: list[str]) -> dict[str, Any]:
    """Runs the config and returns what is printed.

    Raises:
        ValueError: the config is wrong, or has no step after its first window.
    """
    with tempfile.TemporaryDirectory(prefix="oapl-benchmark-") as folder:
        config = config_file.load(TrainConfig, path, [*overrides, f"run.dir={folder}/run"], CHECKS)
        first = config.window.sync_every
        if config.run.steps <= first:
            raise ValueError(
                f"run.steps={config.run.steps} ends in the first window of {first} steps, which is not measured;"
                " raise run.steps or lower window.sync_every"
            )
        metrics_file = pathlib.Path(folder, "run", METRICS_FILE)
        clock = CpuClock(metrics_file, [first, config.run.steps])
        clock.start()
        summary = train.run(config)
        clock.join()
        lines = [line for line in read_metrics(metrics_file) if line["step"] > first]
    cpu = clock.seconds[config.run.steps] - clock.seconds[first]
    return {
        "config": path,
        "overrides": overrides,
        **rates(lines, config),
        "cpu_seconds_per_step": cpu / len(lines),
        "measured_steps": len(lines),
        "seconds_in_all": summary["seconds"],
        "dropped_groups": summary["dropped_groups"],
        "machine": machine(),
    }


class CpuClock(threading.Thread):
    """Notes the CPU seconds used when the metrics of given steps have been written."""

    def __init__(self, metrics_file: pathlib.Path, steps: list[int]):
        super().__init__(daemon=True)
        self._file, self._steps = metrics_file, steps
        self._stopped = threading.Event()
        self.seconds: dict[int, float] = {}

    def run(self) -> None:
        """Looks until all is noted."""
        while len(self.seconds) < len(self._steps) and not self._stopped.wait(POLL_SECONDS):
            self._look()

    def join(self, timeout: float | None = None) -> None:
        """Ends the thread after a last look."""
        self._stopped.set()
        super().join(timeout)
        self._look()

    def _look(self) -> None:
        # The first line is of step 0, before training.
        done = self._file.read_bytes().count(b"\n") - 1 if self._file.exists() else -1
        for step in self._steps:
            if done >= step:
                self.seconds.setdefault(step, cpu_seconds())


def rates(lines: list[Metrics], config: TrainConfig) -> dict[str, float]:
    """Medians and shares over the measured steps."""
    # An evaluation, where there is one, is part of learner/seconds but not of the step's work.
    seconds = [line["learner/seconds"] - line.get("evaluation/seconds", 0.0) for line in lines]
    tokens = sum(line["learner/tokens_per_second"] * line["learner/seconds"] for line in lines)
    idle = sum(line["sampler/idle_seconds"] for line in lines) / sum(line["learner/seconds"] for line in lines)
    return {
        "seconds_per_step": statistics.median(seconds),
        "rollouts_per_second": len(lines) * config.learner.batch_rollouts / sum(seconds),
        "response_tokens_per_second": tokens / sum(seconds),
        "learner_wait_fraction": sum(line["learner/wait_seconds"] for line in lines) / sum(seconds),
        # A wait is counted in the step in which it ends, so the sum may be a little too high.
        "sampler_idle_fraction": min(idle, 1.0),
    }


def cpu_seconds() -> float:
    """User and system time of this process; grading processes are not in it while they live."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def machine() -> dict[str, Any]:
    return {
        "cpus": os.cpu_count(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
