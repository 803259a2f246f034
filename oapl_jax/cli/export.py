"""``oapl-jax export RUN [OUT]``: a checkpoint of a run as a Hugging Face folder, and to the hub."""

import argparse
import pathlib

import jax

from oapl_jax.io.storage import shared_path
from oapl_jax.io.terminal import say
from oapl_jax.run.export import export, push


def main(argv: list[str]) -> None:
    """Exit code 2 where the arguments are wrong."""
    parser = argparse.ArgumentParser(
        prog="oapl-jax export", description="Writes a checkpoint of a run as a Hugging Face folder."
    )
    parser.add_argument("run_dir", type=shared_path, metavar="RUN", help="directory of the run")
    parser.add_argument(
        "out",
        type=pathlib.Path,
        metavar="OUT",
        nargs="?",
        help="default: RUN/export-STEP, of a run in a store NAME-export-STEP here",
    )
    parser.add_argument("--step", type=int, help="step of the checkpoint; default: the newest")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the weights; default: as trained")
    parser.add_argument("--adapter", action="store_true", help="write the trained adapters alone, for peft")
    parser.add_argument("--push", metavar="OWNER/NAME", help="put the folder on the Hugging Face hub too")
    parser.add_argument("--private", action="store_true", help="with --push: a new repository is private")
    arguments = parser.parse_args(argv)
    if arguments.private and not arguments.push:
        parser.error("--private has no effect without --push")
    jax.config.update("jax_platforms", "cpu")  # the devices of a run that goes on are left alone
    folder = export(arguments.run_dir, arguments.out, arguments.step, arguments.dtype, adapter=arguments.adapter)
    say(folder)
    if arguments.push:
        say(push(folder, arguments.push, private=arguments.private))
