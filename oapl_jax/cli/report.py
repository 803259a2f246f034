"""Writes ``report.html`` and ``curves.png`` into a run directory."""

import argparse

from oapl_jax.io.run_dir import check_release
from oapl_jax.io.storage import shared_path
from oapl_jax.io.terminal import say
from oapl_jax.report.report import write_report


def main(argv: list[str]) -> None:
    """Exit code 2 where there is no such run."""
    parser = argparse.ArgumentParser(prog="oapl-jax report", description="Writes the report of a run.")
    parser.add_argument("run", type=shared_path, metavar="RUN", help="directory of a run, e.g. runs/quickstart")
    run = parser.parse_args(argv).run
    check_release(run)
    say(write_report(run))
