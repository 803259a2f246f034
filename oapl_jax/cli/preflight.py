"""Prints whether a run fits a TPU slice, and what it would cost: ``--config C.yaml --topology v5p-64``.

It compiles the programs of the run for described devices, and prints the memory, work and traffic of each and a lower
bound of its time (docs/preflight.md). ``--dry-run`` stops before the first compilation.
"""

import os

# JAX reads this when it is imported: a TPU of this machine is not used.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import json
import pathlib

from oapl_jax.build.checks import CHECKS
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.io.console import ExitCode
from oapl_jax.preflight import topology
from oapl_jax.preflight.preflight import check


def main(argv: list[str]) -> ExitCode:
    """Exit codes: 0 it fits, 1 it does not fit, 2 the config is wrong."""
    config, arguments = config_file.from_command_line(TrainConfig, "preflight", argv, _add_options, checks=CHECKS)
    slices = topology.parse(arguments.topology, arguments.num_slices)
    report = check(config, slices, dry_run=arguments.dry_run)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return ExitCode.DONE if report["fits"] else ExitCode.FAILED


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", required=True, help="name of a slice in Google Cloud, such as v5p-64 or v5e-8")
    parser.add_argument(
        "--num-slices", type=int, default=1, help="number of such slices, joined by the data center network"
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the report as JSON")
