"""``oapl-jax sample --run RUN``: a detached sampler of a run (sources/sampling_process.py)."""

import argparse
import os
import signal
import sys
import threading

import yaml

from oapl_jax.io import storage
from oapl_jax.io.console import ExitCode
from oapl_jax.sources.sampling_process import ENGINES, SamplingProcess, say

EXIT_SECONDS = 8.0
"""After SIGTERM: how long the process may go on to finish its work before it ends anyway."""


def main(argv: list[str]) -> None:
    """Exit codes: 0 the run is over; 1 failed; 2 this process cannot sample for the run; 42 stopped by SIGTERM."""
    parser = argparse.ArgumentParser(prog="oapl-jax sample", description="A detached sampler of a run.")
    parser.add_argument("--run", required=True, help="the run's directory, or its run.shared_dir")
    engines = ", ".join(["jax", *ENGINES])
    parser.add_argument("--engine", default="jax", help=f"{engines}, or package.module:function; default jax")
    parser.add_argument("options", nargs="*", metavar="KEY=VALUE", help="of the engine, such as tensor_parallel_size=2")
    parser.add_argument("--mesh", default="data=-1", help="axes of this process's devices; default data=-1")
    parser.add_argument("--wait", type=float, default=600.0, metavar="SECONDS", help="for a run that has not begun")
    arguments = parser.parse_intermixed_args(argv)
    options = {}
    for word in arguments.options:
        name, equals, value = word.partition("=")
        if not (name and equals):
            parser.error(f"{word!r}: write it as KEY=VALUE")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            parser.error(f"{word!r}: its value cannot be read: {' '.join(str(error).split())}")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    sampler = SamplingProcess(
        storage.shared_path(arguments.run), arguments.engine, arguments.mesh, arguments.wait, stop, options
    )
    failures: list[BaseException] = []

    def run() -> None:
        try:
            sampler.run()
        except BaseException as error:
            failures.append(error)

    # Signals are seen by the main thread only, and only while it is not inside a compilation.
    thread = threading.Thread(target=run, name="main loop", daemon=True)
    thread.start()
    while thread.is_alive() and not stop.is_set():
        thread.join(0.2)
    if stop.is_set():
        thread.join(EXIT_SECONDS)
        if thread.is_alive():
            say("SIGTERM: what is in hand is given back")
            sampler.give_back()
        sys.stdout.flush()
        os._exit(ExitCode.PREEMPTED)  # a compilation in another thread would be waited for
    if failures:
        raise failures[0]
