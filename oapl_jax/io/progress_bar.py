"""The progress of a run on the terminal."""

import contextlib
import io
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import rich.console
import rich.progress

from oapl_jax.io.terminal import say, visible
from oapl_jax.types import Metrics

# The columns of a progress line: metric, label, decimals.
_SHOWN = (
    ("rollouts/reward", "reward", 2),
    ("rollouts/pass_rate", "pass", 2),
    ("window/lag", "lag", 0),
    ("learner/residual", "residual", 3),
)
_SHOWN_WITHOUT_ROLLOUTS = (("learner/loss", "loss", 3),)
_WIDE = 100
"""Characters of a terminal with room for one more column."""
_SECONDS_BETWEEN_LINES = (2.0, 60.0)
_TASK = rich.progress.TaskID(0)
SECONDS_OF_DRAINING = 0.3
"""For how long ``TerminalLines.stop`` waits for lines that are not shown yet."""
SECONDS_OF_SILENCE = 15.0
"""After which a stage says that it goes on."""


class ProgressBar:
    """Shows how a run goes: a live bar on a terminal, plain lines elsewhere (CI logs, pods, notebooks).

    Plain lines are at least 2 seconds apart, up to a minute in long runs; the last step always has one.
    """

    def __init__(self, total_steps: int, *, enabled: bool = True, stream: Any = None, unit: str = "step"):
        """``total_steps`` include those before a resume; not ``enabled``, only notes are printed."""
        self._total, self._unit, self._enabled = total_steps, unit, enabled
        self._stream = sys.stdout if stream is None else stream
        self._capture: TerminalLines | None = None
        if enabled and _is_terminal(self._stream):
            self._capture = TerminalLines(self.note)
            self._stream = os.fdopen(os.dup(self._stream.fileno()), "w")
        self._shown: Metrics = {}
        self._first: tuple[int, float] | None = None
        self._last_line = -math.inf
        self._bar = _make_bar(self._stream) if enabled and self._stream.isatty() else None
        if self._bar is not None:
            self._bar.add_task("", total=total_steps, shown="", left="")

    def expect(self, total_steps: int) -> None:
        """Corrects the number of steps in all."""
        self._total = total_steps
        if self._bar is not None:
            self._bar.update(_TASK, total=total_steps)

    def update(self, step: int, metrics: Metrics) -> None:
        """Says that learner step ``step`` (counted from 1) is done. Metrics that are missing keep their value."""
        if not self._enabled:
            return
        self._shown.update(metrics)
        now = time.monotonic()
        # The first step compiles: the pace is measured from its end.
        self._first = self._first or (step, now)
        is_wide = self._bar is None or self._bar.console.width >= _WIDE
        shown, left = _describe(self._shown, is_wide=is_wide), _time_left(self._first, (step, now), self._total)
        if self._bar is not None:
            self._bar.update(_TASK, completed=step, shown=" ".join(shown), left=left)
        elif step >= self._total or now - self._last_line >= self._pause(now):
            self._last_line = now
            width = len(str(self._total))
            self.note("  ".join([f"{self._unit} {step:{width}}/{self._total}", *shown, left]))

    def note(self, message: str) -> None:
        """Prints one line that stays, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(visible(message), markup=False, highlight=False, soft_wrap=True)
        else:
            say(message.rstrip(), self._stream)

    @contextlib.contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """Says what begins, and now and then that it goes on."""
        start, has_ended = time.monotonic(), threading.Event()

        def beat() -> None:
            while not has_ended.wait(SECONDS_OF_SILENCE):
                self.note(f"{text}: {time.monotonic() - start:.0f} s so far")

        self.note(text)
        thread = threading.Thread(target=beat, name="stage", daemon=True)
        thread.start()
        try:
            yield
        finally:
            has_ended.set()
            thread.join()

    def _pause(self, now: float) -> float:
        shortest, longest = _SECONDS_BETWEEN_LINES
        elapsed = 0.0 if self._first is None else now - self._first[1]
        return min(longest, max(shortest, elapsed / 50))

    def __enter__(self) -> "ProgressBar":
        if self._bar is not None:
            if self._capture is not None:
                self._capture.start()
            self._bar.start()
            _live.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None and self in _live:
            _live.remove(self)
            if self._capture is not None:
                self._capture.stop()
            self._bar.stop()


_live: list[ProgressBar] = []


def stop_live() -> None:
    """Gives the terminal back as it was, at once."""
    for bar in list(_live):
        bar.__exit__()


class TerminalLines:
    """Gives ``show`` the lines that anything in this process or its children writes to the terminal.

    Libraries in C++ write to the file descriptors themselves; so these are a pipe meanwhile, where they are a terminal.
    """

    def __init__(self, show: Callable[[str], None]):
        self._show = show

    def start(self) -> None:
        """Begins."""
        self._saved = {number: os.dup(number) for number in (1, 2) if os.isatty(number)}
        read_end, write_end = os.pipe()
        for number in self._saved:
            os.dup2(write_end, number)
        os.close(write_end)
        self._reader = threading.Thread(target=self._read, args=(read_end,), name="terminal", daemon=True)
        self._reader.start()

    def stop(self) -> None:
        """Shows what was written, and gives the terminal back. Children may write to the pipe until they end."""
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        for number, saved in self._saved.items():
            os.dup2(saved, number)
            os.close(saved)
        self._reader.join(SECONDS_OF_DRAINING)  # it ends with the last child that has the pipe

    def _read(self, read_end: int) -> None:
        with open(read_end, "rb") as pipe:
            for line in pipe:
                text = line.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]  # of a bar, its last state
                if text:
                    self._show(text)


def _is_terminal(stream: Any) -> bool:
    try:
        return os.isatty(stream.fileno())
    except (AttributeError, OSError, io.UnsupportedOperation):
        return False


def _make_bar(stream: Any) -> rich.progress.Progress:
    column = rich.progress.TextColumn
    return rich.progress.Progress(
        column("{task.completed}/{task.total}"),
        rich.progress.BarColumn(bar_width=None),
        column("{task.fields[shown]} {task.fields[left]}", markup=False),
        console=rich.console.Console(file=stream, force_terminal=True),
        expand=True,
        redirect_stdout=False,  # see ``TerminalLines``
        redirect_stderr=False,
    )


def _describe(metrics: Metrics, *, is_wide: bool) -> list[str]:
    """One word group a column; unless it is wide, they fit 80 characters together with step and time left."""
    columns = [column for column in _SHOWN if column[0] in metrics]
    columns = columns or [column for column in _SHOWN_WITHOUT_ROLLOUTS if column[0] in metrics]
    words = [f"{label} {float(metrics[name]):.{decimals}f}" for name, label, decimals in columns]
    if "learner/tokens_per_second" in metrics:
        speed = float(metrics["learner/tokens_per_second"])
        words.append(f"{speed:.0f} tok/s" if speed < 1e3 else f"{speed / 1e3:.1f}k tok/s")
    if is_wide and "learner/mfu" in metrics:
        words.append(f"mfu {float(metrics['learner/mfu']):.2f}")
    return words


def _time_left(first: tuple[int, float], last: tuple[int, float], total: int) -> str:
    steps, seconds = last[0] - first[0], last[1] - first[1]
    if steps <= 0:
        return "left -:--"
    left = round(seconds / steps * (total - last[0]))
    hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
    return f"left {hours}:{minutes:02}:{seconds:02}" if hours else f"left {minutes}:{seconds:02}"
