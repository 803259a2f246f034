"""Detached samplers, or generation workers, as actors on a Ray cluster that exists: placed, restarted and ended by Ray.

    python launch/ray_samplers.py start --name math --num 8 --gpus 1 -- sample --run /shared/runs/math
    python launch/ray_samplers.py start --name data --num 64 --cpus 4 -- generate --config configs/countdown_generate.yaml
    python launch/ray_samplers.py scale --name math 12

``start`` stays until the work is done, and the actors end with it. An actor whose resources are not there yet waits for
them; one that dies, or whose process is stopped by a signal, is started again where there is room. The nodes have this
package, and see the run directory. Needs the extra ``ray``.
"""

import argparse
import logging
import os
import subprocess
import sys
import time
from typing import Any

import ray  # pyright: ignore[reportMissingImports]

NAMESPACE = "oapl_jax"
EXIT_SAVED = 42
STOP_SECONDS = 60.0
"""Given to processes that have to stop, to finish the work in hand."""
POLL_SECONDS = 1.0
# In the process, before it becomes the program: SIGTERM when its actor dies, so that none stays behind on a device.
_WITH_PARENT = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"  # PR_SET_PDEATHSIG
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class Worker:
    """A process of ``oapl-jax`` on the node where Ray has placed the actor."""

    def __init__(self, words: list[str]):
        self._is_stopped = False
        program = [sys.executable, "-c", _WITH_PARENT, "-m", "oapl_jax", *words]
        self._process = subprocess.Popen(program)

    def wait(self) -> int:
        """The exit code of the process. One that was stopped from outside takes the actor with it: Ray restarts both."""
        code = self._process.wait()
        if not self._is_stopped and (code < 0 or code == EXIT_SAVED):
            os._exit(1)
        return code

    def stop(self) -> None:
        """Ends the process, which gives back what it has in hand."""
        self._is_stopped = True
        self._process.terminate()


class Target:
    """How many workers there should be; ``scale`` finds this actor by its name."""

    def __init__(self, number: int):
        self._number = number

    def get(self) -> int:
        """The number."""
        return self._number

    def set(self, number: int) -> None:
        """Another number."""
        self._number = number


def run(name: str, number: int, options: dict[str, Any], words: list[str]) -> None:
    """Keeps as many workers as the target says until one of them has found the work done, and waits for the others.

    Raises:
        RuntimeError: a process has failed; its output has the reason.
    """
    remote: Any = ray.remote  # typed for classes that are decorated
    target = remote(num_cpus=0)(Target).options(name=name).remote(number)
    make = remote(max_restarts=-1, max_task_retries=-1, max_concurrency=2, **options)(Worker)
    workers: list[Any] = []
    ends: dict[Any, Any] = {}  # the result of ``wait`` -> its worker
    is_done, deadline = False, float("inf")
    while not (is_done and not ends):
        wanted = 0 if time.monotonic() > deadline else len(workers) if is_done else int(ray.get(target.get.remote()))
        while len(workers) < wanted:
            worker = make.remote(words)
            workers.append(worker)
            ends[worker.wait.remote()] = worker
            print(f"{len(workers)} workers: {name} {len(workers) - 1} is asked for", flush=True)
        for worker in workers[wanted:]:
            worker.stop.remote()
        del workers[wanted:]
        for end in ray.wait(list(ends), timeout=POLL_SECONDS)[0] if ends else []:
            code, worker = ray.get(end), ends.pop(end)
            ray.kill(worker)
            if worker in workers:
                workers.remove(worker)
                if code:
                    raise RuntimeError(f"a process of {name} ended with {code}: oapl-jax {' '.join(words)}")
                is_done, deadline = True, min(deadline, time.monotonic() + STOP_SECONDS)
        if not ends:
            time.sleep(POLL_SECONDS)
    print(f"{name}: done", flush=True)


def _parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    own, _, words = (argv[: argv.index("--")], "--", argv[argv.index("--") + 1 :]) if "--" in argv else (argv, "", [])
    parser = argparse.ArgumentParser(prog="launch/ray_samplers.py", description="Workers of oapl-jax on a Ray cluster.")
    actions = parser.add_subparsers(dest="action", required=True)
    start = actions.add_parser("start", help="start workers, and stay until the work is done")
    scale = actions.add_parser("scale", help="change their number while they work")
    for action in (start, scale):
        action.add_argument("--name", required=True, help="of the workers, in the cluster")
        action.add_argument("--address", default="auto", help="of the cluster (default: %(default)s)")
    start.add_argument("--num", type=int, default=1, help="of workers (default: %(default)s)")
    start.add_argument("--cpus", type=float, default=1, help="of each worker (default: %(default)s)")
    start.add_argument("--gpus", type=float, default=0, help="of each worker (default: %(default)s)")
    start.add_argument(
        "--resource", action="append", default=[], metavar="NAME=AMOUNT", help="another, such as TPU=4, of each worker"
    )
    scale.add_argument("number", type=int, help="of workers")
    arguments = parser.parse_args(own)
    if arguments.action == "start" and words[:1] not in (["sample"], ["generate"]):
        start.error("after -- comes the command of oapl-jax: sample --run RUN, or generate --config C")
    return arguments, words


def main(argv: list[str]) -> int:
    """The command line; exit codes: 0 the work is done, 1 a process failed."""
    arguments, words = _parse_arguments(argv)
    ray.init(address=arguments.address, namespace=NAMESPACE, log_to_driver=True, logging_level=logging.WARNING)
    if arguments.action == "scale":
        ray.get(ray.get_actor(arguments.name).set.remote(arguments.number))
        return 0
    resources = {name: float(amount) for name, _, amount in (word.partition("=") for word in arguments.resource)}
    options = {"num_cpus": arguments.cpus, "num_gpus": arguments.gpus, "resources": resources}
    try:
        run(arguments.name, arguments.num, options, words)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
