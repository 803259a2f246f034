"""SIGTERM: a machine is taken away, and the work goes on where it is given back."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def catch_sigterm() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGTERM came; only the main thread of a process can listen."""
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield received.is_set
        return
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.set())
    try:
        yield received.is_set
    finally:
        signal.signal(signal.SIGTERM, previous)
