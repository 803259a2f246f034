"""Checks, from the files of a run, what it was trained on."""

import argparse

from oapl_jax.io.storage import shared_path
from oapl_jax.io.terminal import say
from oapl_jax.rollouts.audit import audit


def main(argv: list[str]) -> None:
    """Exit codes: 0 the files agree with the record, 1 they do not, 2 there is no such run."""
    parser = argparse.ArgumentParser(prog="oapl-jax audit", description="Checks what a run was trained on.")
    parser.add_argument("run", type=shared_path, metavar="RUN", help="directory of the run, or its address in a store")
    say(audit(parser.parse_args(argv).run))
