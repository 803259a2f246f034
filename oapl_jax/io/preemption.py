"""SIGTERM and Ctrl-C: a machine is taken away, or the user wants it back, and the work goes on later."""

import os
import signal
import threading
from types import FrameType
from typing import Any

CTRL_C = b"\nCtrl-C: the run is saved after this step; once more: it ends at once\n"


class StopSignals:
    """Keeps SIGTERM, and Ctrl-C where that is wanted; only the main thread of a process can listen. A context manager."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.takes_interrupts = False
        """Whether the first Ctrl-C is only kept; else, and from the second on, it does what it did before."""
        self._previous: dict[int, Any] = {}

    def is_set(self) -> bool:
        """Whether a signal came."""
        return self.received is not None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.is_set() or not self.takes_interrupts:
                if callable(previous := self._previous[number]):
                    previous(number, frame)
                return
            os.write(2, CTRL_C)  # ``print`` may be interrupted by this very signal
        self.received = signal.Signals(number)
