"""Tests which isolation levels this machine offers, and prints the level at which programs would be graded.

python -m oapl_jax check-sandbox [--level namespaces|uid|landlock] [--packages numpy,...] [--python FILE]

The exit code is 0 if ``--level`` or a stronger level works, and 1 otherwise.
"""

import argparse

from oapl_jax.io.terminal import say
from oapl_jax.rewards.code.sandbox import isolation
from oapl_jax.rewards.code.sandbox.sandbox import Settings
from oapl_jax.rewards.code.sandbox.self_test import try_level

WHAT_IT_MEANS = {
    "namespaces": "programs see only libraries: no other files, processes or networks",
    "uid": "programs have a uid of their own; Landlock hides the contents of files, not their names; the process table is shared",
    "landlock": "programs have this user's uid; Landlock hides the contents of files, not their names; only the seccomp"
    " filter stands between a program and signals to other processes of this user",
}


def main(argv: list[str]) -> int:
    """Prints a line for each level, strongest first, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="oapl-jax check-sandbox", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--level", choices=isolation.LEVELS, default="namespaces", help="weakest level that is accepted"
    )
    parser.add_argument("--packages", default="", help="packages to preload, separated by commas")
    parser.add_argument("--python", help="interpreter of the programs")
    arguments = parser.parse_args(argv)
    packages = tuple(filter(None, arguments.packages.split(",")))
    settings = Settings(arguments.level, packages, arguments.python)
    works = []
    for level in isolation.LEVELS:
        worker, reason = try_level(level, settings)
        if worker is None:
            say(f"{level:<11} no    {reason}")
            continue
        works.append(level)
        say(f"{level:<11} yes   Landlock {worker.info['landlock'] or 'none'}, uid {worker.info['uid']}")
        say(f"{'':<11}       {WHAT_IT_MEANS[level]}")
        worker.close()
    if not works or isolation.LEVELS.index(works[0]) > isolation.LEVELS.index(arguments.level):
        say(f"\nno program would be graded: no level works that is at least as strong as {arguments.level}")
        return 1
    say(f"\nprograms would be graded at level {works[0]}")
    return 0
