"""Whose turn it is to use the process's one sampler."""

import contextlib
import threading
from collections.abc import Iterator

from oapl_jax.rollouts.sampling import Sampler


class SamplerTurns:
    """Gives the sampler to one caller at a time.

    The sampling loop has it most of the time. When somebody else wants it, for an evaluation or the parity gate, the
    loop admits nothing new, finishes what is in flight, and passes it on.
    """

    def __init__(self, sampler: Sampler):
        self._sampler = sampler
        self._turn = threading.Lock()
        self._changed = threading.Condition()
        self._num_waiting = 0

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for a turn."""
        return self._num_waiting > 0

    @contextlib.contextmanager
    def take(self) -> Iterator[Sampler]:
        """Waits for a turn and lends the sampler, idle and with no weights that the caller may count on."""
        with self._changed:
            self._num_waiting += 1
        try:
            self._turn.acquire()
        finally:
            with self._changed:
                self._num_waiting -= 1
                self._changed.notify_all()
        try:
            yield self._sampler
        finally:
            self._sampler.abort()
            self._turn.release()

    @contextlib.contextmanager
    def take_when_unwanted(self) -> Iterator[Sampler]:
        """The same for the sampling loop, which lets all others go first."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_waiting == 0)
        with self.take() as sampler:
            yield sampler
