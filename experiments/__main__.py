"""Trains what a grid of experiments lacks, and writes its tables and figures.

    python -m experiments experiments/paper.yaml --out runs/paper [--processes 2] [--report] [section.key=value ...]

Overrides are of the config of each training run. Everything is under ``--out``; the same command again goes on where it was stopped.
"""

import argparse
import itertools
import pathlib
import sys
import time

from experiments import report
from experiments.grid import Grid, Run, arm_runs, load, search_runs, warm_starts
from experiments.runner import Runner, cpu_seconds
from oapl_jax.io import console


def main(argv: list[str]) -> None:
    """Command line; exit codes: 0 done, 1 some runs failed, 2 the grid is wrong."""
    parser = argparse.ArgumentParser(
        "python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=pathlib.Path, help="a file of experiments/")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of all runs and results")
    parser.add_argument("--processes", type=int, default=2, help="runs at once; they share the cores (default: 2)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the config of each training run")
    parser.add_argument("--report", action="store_true", help="train nothing: tables and figures of what has ended")
    arguments = parser.parse_intermixed_args(argv)
    grid, out = load(arguments.grid, arguments.overrides), arguments.out.resolve()
    if not arguments.report:
        start = time.monotonic()
        try:
            _train(grid, out, Runner(out, arguments.processes))
        finally:
            print(f"{(time.monotonic() - start) / 60:.0f} minutes, {cpu_seconds() / 60:.0f} CPU minutes")
    if not out.is_dir():
        raise ValueError(f"{out}: nothing has been trained; leave --report out")
    print(report.write(grid, out))


def _train(grid: Grid, out: pathlib.Path, runner: Runner) -> None:
    """Warm starts, then searches, then arms: the first pair of all arms, then the second, and so on."""
    runner.run(warm_starts(grid, out))
    runner.run([run for name in grid.searches for _, run in search_runs(grid, name, out)])
    arms: list[list[Run]] = []
    for name, arm in grid.arms.items():
        choice = report.choose(grid, arm.search, out) if arm.search else None
        arms.append(list(arm_runs(grid, name, choice.settings if choice else {}, out).values()))
    runner.run([run for runs in itertools.zip_longest(*arms) for run in runs if run is not None])


if __name__ == "__main__":
    sys.exit(console.run(main, sys.argv[1:]))
