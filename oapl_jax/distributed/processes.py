"""The processes of one JAX job (``jax.distributed``): how one joins, and what they say to each other.

Arrays travel between devices. Everything else is small and rare, and goes through the job's coordination
service, which the first process hosts: JSON values by key. Every wait has a deadline, and ends at
once when a process has said that it failed. A process that dies without a word ends the whole job: JAX notices
after ``HEARTBEAT_SECONDS``.
"""

import argparse
import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax._src import distributed  # the client of the coordination service has no public name

from oapl_jax.types import PreemptedError, RunError

HEARTBEAT_SECONDS = 100
START_SECONDS = 300
"""For how long a process waits for the others to join."""
SLICE_SECONDS = 0.5
"""Longest single wait: between two, the process looks at its own signals and at the failures of others."""
BARRIER_SECONDS = 1800.0
"""Others may be compiling, or reading weights."""
KEPT_KEYS = 100
"""Messages of a kind before the newest that are kept for who has not heard them yet: by far more than may be."""

FAILED_KEY = "failed"
PREEMPTED_KEY = "preempted"


class PeerError(RunError):
    """Another process of the job has failed."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The explicit way to join a job, where the environment does not say it."""
    job = parser.add_argument_group("several processes", "found in the environment on GKE TPUs, Slurm and OpenMPI")
    job.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of the process with id 0; auto: JAX finds out (TPU VMs, Kubernetes)"
    )
    job.add_argument("--num-processes", type=int, metavar="N", help="in the job")
    job.add_argument("--process-id", type=int, metavar="I", help="of this one, from 0")


def initialize(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> None:
    """Joins the job that the options or the environment name, if there is one; before any other use of JAX.

    Raises:
        ValueError: the options are not all there.
    """
    explicit = {
        "coordinator_address": arguments.coordinator,
        "num_processes": arguments.num_processes,
        "process_id": arguments.process_id,
    }
    given = {key: value for key, value in explicit.items() if value is not None}
    if given == {"coordinator_address": "auto"}:
        given = {}
    elif not given and not is_one_of_several(environment):
        return
    elif given and (len(given) < len(explicit) or arguments.coordinator == "auto"):
        raise ValueError(
            "--coordinator, --num-processes and --process-id: give all three, or none, or --coordinator auto"
        )
    # JAX's own listener for SIGTERM would take the signal away from ours.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        **given, initialization_timeout=START_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )


def is_one_of_several(environment: Mapping[str, str]) -> bool:
    """Whether the environment is that of a job of several processes which JAX can join by itself."""
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
    return len(hosts) > 1 or any(int(environment.get(name) or 1) > 1 for name in counts)


class Processes:
    """Some processes of the job, which do the same in the same order; the first one leads.

    Args:
        name: of the set, in keys.
        members: their ids.
    """

    def __init__(self, name: str, members: Sequence[int]):
        self.name, self.members = name, tuple(sorted(members))
        self._num_agreed = self._num_barriers = 0

    @property
    def is_leader(self) -> bool:
        """This process is the first of them."""
        return jax.process_index() == self.members[0]

    @property
    def rank(self) -> int:
        """Place of this process among them."""
        return self.members.index(jax.process_index())

    def agree(self, make: Callable[[], Any], deadline: float, look: Callable[[], object] = lambda: None) -> Any:
        """What the leader makes (as JSON has it), in every member.

        Args:
            make: called by the leader only.
            deadline: seconds for which the others wait.
            look: called by those who wait, again and again.

        Raises:
            PeerError: a process has failed.
            TimeoutError: the leader says nothing.
        """
        if len(self.members) == 1:
            return make()
        self._num_agreed += 1
        key = f"{self.name}/{self._num_agreed}"
        if not self.is_leader:
            return hear(key, deadline, look)
        value = make()
        tell(key, value)
        forget(f"{self.name}/{self._num_agreed - KEPT_KEYS}")
        return value

    def any_of(self, value: Any, deadline: float = BARRIER_SECONDS) -> Any:
        """A value that is not None, of the first member that has one; None where none has. All of them call this."""
        self._num_agreed += 1
        key = f"{self.name}/{self._num_agreed}"
        tell(f"{key}/{jax.process_index()}", value)
        values = [hear(f"{key}/{member}", deadline) for member in self.members]
        return next((value for value in values if value is not None), None)

    def wait(self, deadline: float = BARRIER_SECONDS) -> None:
        """Returns when all members are here.

        Raises:
            PeerError: a process has failed.
            TimeoutError: one does not come.
        """
        if len(self.members) == 1:
            return
        self._num_barriers += 1
        key = f"{self.name}/barrier/{self._num_barriers}"
        # JAX's own barrier does not look at failures while it waits.
        if _client().key_value_increment(f"{key}/arrived", 1) == len(self.members):
            tell(f"{key}/open", True)
        hear(f"{key}/open", deadline)
        if self.is_leader and self._num_barriers > 1:  # all have left the one before
            forget(f"{self.name}/barrier/{self._num_barriers - 1}")


def tell(key: str, value: Any) -> None:
    """Leaves a value for all processes of the job."""
    _client().key_value_set(key, json.dumps(value), allow_overwrite=True)


def forget(key: str) -> None:
    """Deletes a key, and those below it."""
    _client().key_value_delete(key)


def heard(key: str) -> Any:
    """The value of a key; None where nobody has told it."""
    try:
        return json.loads(_client().key_value_try_get(key))
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def hear(key: str, deadline: float, look: Callable[[], object] = lambda: None) -> Any:
    """The value of a key, when someone tells it.

    Args:
        key: of it.
        deadline: seconds to wait.
        look: called again and again meanwhile.

    Raises:
        PeerError: a process has failed.
        TimeoutError: nobody does.
    """
    end = time.monotonic() + deadline
    while True:
        look()
        try:
            return json.loads(_client().blocking_key_value_get(key, int(SLICE_SECONDS * 1000)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        check_peers()
        if time.monotonic() > end:
            raise TimeoutError(f"waited {deadline:g} s for another process of the job to say {key!r}")


def check_peers() -> None:
    """Raises PeerError where another process has said that it failed."""
    if (
        jax.process_count() > 1
        and (failure := heard(FAILED_KEY)) is not None
        and failure["process"] != jax.process_index()
    ):
        raise PeerError(f"process {failure['process']} of the job failed: {failure['error']}")


@contextlib.contextmanager
def telling_failures() -> Iterator[None]:
    """Tells the other processes of an exception, which ends this one: they would wait for it."""
    try:
        yield
    except Exception as error:
        if jax.process_count() > 1 and not isinstance(error, (PeerError, PreemptedError)):
            tell(FAILED_KEY, {"process": jax.process_index(), "error": f"{type(error).__name__}: {error}"[:2000]})
        raise


def forward_preemption(is_preempted: Callable[[], bool]) -> Callable[[], bool]:
    """Whether SIGTERM came to any process of the job; a process that gets one tells the others at once."""
    if jax.process_count() == 1:
        return is_preempted
    told = threading.Event()

    def is_any_preempted() -> bool:
        if is_preempted() and not told.is_set():
            tell(PREEMPTED_KEY, jax.process_index())
            told.set()
        return told.is_set() or heard(PREEMPTED_KEY) is not None

    return is_any_preempted


def _client() -> Any:
    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("this process is not part of a job of several processes")
    return client
