"""What the processes of a JAX job say to each other: small JSON values by key, through the job's coordination service.

Every wait has a deadline, and ends at once when a process has reported that it failed.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed  # the client of the coordination service has no public name

from oapl_jax.types import PreemptedError, RunError

SLICE_SECONDS = 0.5
"""Longest single wait: between two, the process looks at its own signals and at the failures of others."""

FAILED_KEY = "failed"
PREEMPTED_KEY = "preempted"


class PeerError(RunError):
    """Another process of the job has failed."""


def put(key: str, value: Any) -> None:
    """Leaves a value for all processes of the job."""
    _client().key_value_set(key, json.dumps(value), allow_overwrite=True)


def delete(key: str) -> None:
    """Deletes a key, and those below it."""
    _client().key_value_delete(key)


def get(key: str) -> Any:
    """The value of a key; None where it has none."""
    try:
        return json.loads(_client().key_value_try_get(key))
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def wait_for(key: str, deadline: float, poll: Callable[[], object] = lambda: None) -> Any:
    """The value of a key, as soon as it has one; ``poll`` is called again and again meanwhile.

    Raises:
        PeerError: a process has failed.
        TimeoutError: nobody has put a value there within ``deadline`` seconds.
    """
    end = time.monotonic() + deadline
    while True:
        poll()
        try:
            return json.loads(_client().blocking_key_value_get(key, int(SLICE_SECONDS * 1000)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        check_peers()
        if time.monotonic() > end:
            raise TimeoutError(f"waited {deadline:g} s for another process of the job to put {key!r}")


def increment(key: str) -> int:
    """Adds one to a counter of the job and returns it."""
    return _client().key_value_increment(key, 1)


def check_peers() -> None:
    """Raises PeerError where another process has reported that it failed."""
    failure = get(FAILED_KEY) if jax.process_count() > 1 else None
    if failure is not None and failure["process"] != jax.process_index():
        raise PeerError(f"process {failure['process']} of the job failed: {failure['error']}")


@contextlib.contextmanager
def reporting_failures() -> Iterator[None]:
    """Reports an exception, which ends this process, to the others: they would wait for it."""
    try:
        yield
    except Exception as error:
        if jax.process_count() > 1 and not isinstance(error, (PeerError, PreemptedError)):
            put(FAILED_KEY, {"process": jax.process_index(), "error": f"{type(error).__name__}: {error}"[:2000]})
        raise


def forward_preemption(is_preempted: Callable[[], bool]) -> Callable[[], bool]:
    """Whether SIGTERM came to any process of the job; a process that receives it informs the others at once."""
    if jax.process_count() == 1:
        return is_preempted
    is_known = threading.Event()

    def is_any_preempted() -> bool:
        if is_preempted() and not is_known.is_set():
            put(PREEMPTED_KEY, jax.process_index())
            is_known.set()
        return is_known.is_set() or get(PREEMPTED_KEY) is not None

    return is_any_preempted


def _client() -> Any:
    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("this process is not part of a job of several processes")
    return client
