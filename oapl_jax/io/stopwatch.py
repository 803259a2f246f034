"""A timer that adds up seconds by name."""

import collections
import contextlib
import threading
import time
from collections.abc import Iterator


class Stopwatch:
    """Adds up seconds by name, from any thread.

    >>> stopwatch = Stopwatch()
    >>> with stopwatch("learner/wait_seconds"):
    ...     pass
    >>> list(stopwatch.collect())
    ['learner/wait_seconds']
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times the block, an exception in it included."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[name] += time.perf_counter() - start

    def collect(self) -> dict[str, float]:
        """The sums since the last call."""
        with self._lock:
            seconds, self._seconds = dict(self._seconds), collections.defaultdict(float)
        return seconds
