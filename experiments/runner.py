"""Runs training processes side by side, each on its own cores; what has ended is not run again, what was killed goes on."""

import concurrent.futures
import os
import pathlib
import queue
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

import yaml

from experiments.grid import Run, config_path
from oapl_jax.types import RunError

ENDED = {"train": "summary.json", "sft": "export"}
"""What a command leaves at its end."""
POLL_SECONDS = 0.1
NON_FINITE = "the run stops here and its last checkpoint is kept"
"""Of the message of ``oapl_jax/io/non_finite.py``."""


class Runner:
    """A number of processes at once, which share the cores of this machine evenly."""

    def __init__(self, out: pathlib.Path, num_processes: int) -> None:
        cores = sorted(os.sched_getaffinity(0))
        if num_processes > len(cores):
            raise ValueError(f"--processes {num_processes}: this machine has {len(cores)} cores")
        self.out, self._shares = out, queue.SimpleQueue()
        for i in range(num_processes):
            self._shares.put(set(cores[i::num_processes]))
        self._pool = concurrent.futures.ThreadPoolExecutor(num_processes)

    def run(self, runs: Sequence[Run]) -> None:
        """Runs what has not ended, in this order.

        Raises:
            RunError: some have failed; the others have ended. The message names their logs.
        """
        left = [run for run in runs if not is_over(run, self.out)]
        if not left:
            return
        futures = {self._pool.submit(self._run_one, run): run for run in left}
        failed = []
        try:
            for i, future in enumerate(concurrent.futures.as_completed(futures), start=1):
                run, (code, seconds) = futures[future], future.result()
                print(
                    f"[{i}/{len(left)}] {run.name}: {seconds:.0f} s{f', exit code {code}' if code else ''}", flush=True
                )
                failed += [] if is_over(run, self.out) else [run]
        except BaseException:
            self._pool.shutdown(cancel_futures=True)  # the children have got the signal too
            raise
        if failed:
            logs = "\n  ".join(str(_log_path(run, self.out)) for run in failed)
            raise RunError(f"{len(failed)} of {len(left)} runs failed; the same command tries them again:\n  {logs}")

    def _run_one(self, run: Run) -> tuple[int, float]:
        """Exit code, and CPU seconds of the process and its children."""
        path, log = config_path(run, self.out), _log_path(run, self.out)
        for folder in (path.parent, log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(run.config, sort_keys=False))
        cores = self._shares.get()
        words = [[run.command, "--config", str(path)]]
        words += [["sample", "--run", str(self.out / run.name), *run.sampler]] if run.sampler else []
        start = time.monotonic()
        children: list[subprocess.Popen[bytes]] = []
        try:
            with log.open("ab") as output:
                for each in words:
                    child = subprocess.Popen(
                        [sys.executable, "-m", "oapl_jax", *each],
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        preexec_fn=lambda: os.sched_setaffinity(0, cores),
                    )
                    children.append(child)
            trainer, *samplers = children
            # A run whose sampler has failed would wait for another one.
            while trainer.poll() is None and not any(sampler.poll() for sampler in samplers):
                time.sleep(POLL_SECONDS)
        finally:
            for child in children:
                child.terminate()  # does nothing to one that has ended
                child.wait()
            self._shares.put(cores)
        if is_over(run, self.out):  # nothing reads its checkpoints, which are most of what it leaves
            shutil.rmtree(self.out / run.name / "checkpoints", ignore_errors=True)
        return trainer.returncode, time.monotonic() - start


def is_over(run: Run, out: pathlib.Path) -> bool:
    """Whether a run has ended, or has diverged."""
    return (out / run.name / ENDED[run.command]).exists() or has_diverged(run, out)


def has_diverged(run: Run, out: pathlib.Path) -> bool:
    """Whether a loss that was not finite has stopped a run: that is a result, its last evaluation its last state."""
    log = _log_path(run, out)
    return log.is_file() and NON_FINITE in log.read_text(errors="replace")


def cpu_seconds() -> float:
    """CPU seconds of the processes that have ended since the start of this one."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _log_path(run: Run, out: pathlib.Path) -> pathlib.Path:
    return out / "logs" / f"{run.name.replace('/', '.')}.log"
