"""Writes ``report.html`` and ``curves.png`` into a run directory."""

import argparse
import pathlib

from oapl_jax.report.report import write_report


def main(argv: list[str]) -> None:
    """Writes the report and prints its path."""
    parser = argparse.ArgumentParser(prog="python -m oapl_jax report", description="Writes the report of a run.")
    parser.add_argument("run_dir", type=pathlib.Path, metavar="RUN", help="directory of a run, e.g. runs/quickstart")
    run_dir = parser.parse_args(argv).run_dir
    if not run_dir.is_dir():
        parser.error(f"run directory {str(run_dir)!r} does not exist")
    print(write_report(run_dir))
