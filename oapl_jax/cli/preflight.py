"""``oapl-jax preflight --config C.yaml --topology v5p-64``: whether a run fits a TPU slice, and what it would cost.

Compiles the programs of the run for devices that are only described, and prints for each its memory, work, traffic and
a lower bound of its time (docs/preflight.md). ``--dry-run`` stops before the first compilation.
"""

import os

# Read by jax when it is imported: a real TPU is not touched, should there be one.
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
    """Exit codes: 0 it fits, 1 it does not, 2 the config is wrong."""
    config, arguments = config_file.from_command_line(TrainConfig, "preflight", argv, _add_options, checks=CHECKS)
    slices = topology.parse(arguments.topology, arguments.num_slices)
    report = check(config, slices, dry_run=arguments.dry_run)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return ExitCode.DONE if report["fits"] else ExitCode.FAILED


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", required=True, help="slice by its name in Google Cloud, e.g. v5p-64 or v5e-8")
    parser.add_argument(
        "--num-slices", type=int, default=1, help="slices of that kind, joined by the data center network"
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the report as JSON, too")
