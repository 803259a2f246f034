"""The progress of a run on the terminal."""

import contextlib
import io
import math
import os
import select
import subprocess
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
_SECONDS_BETWEEN_LINES = (2.0, 60.0)
SECONDS_OF_DEATH = 0.05
"""Between the last words of a process and its end, at most: so long they are left in the pipe."""
SECONDS_OF_SILENCE = 15.0
"""After which a stage says that it goes on."""


class ProgressBar:
    """Shows how a run goes: a live bar on a terminal, plain lines elsewhere (CI logs, pods, notebooks).

    Plain lines are at least 2 seconds apart, up to a minute in long runs; the last step always has one.
    """

    def __init__(self, total_steps: int, *, enabled: bool = True, stream: Any = None, unit: str = "step"):
        """Prepares the display.

        Args:
            total_steps: learner steps in all, those before a resume included.
            enabled: False silences ``update``; notes are printed all the same.
            stream: text file to print to; None: standard output.
            unit: what is counted.
        """
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
        self._task = self._bar.add_task("", total=total_steps, shown="", left="") if self._bar else None

    def expect(self, total_steps: int) -> None:
        """Corrects the number of steps in all."""
        self._total = total_steps
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total_steps)

    def update(self, step: int, metrics: Metrics) -> None:
        """Says that learner step ``step`` (counted from 1) is done. Metrics that are missing keep their value."""
        if not self._enabled:
            return
        self._shown.update(metrics)
        now = time.monotonic()
        # The first step compiles: the pace is measured from its end.
        self._first = self._first or (step, now)
        shown, left = _describe(self._shown), _time_left(self._first, (step, now), self._total)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, shown=" ".join(shown), left=left)
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
    Should the process be killed, a child of its own prints what is left in the pipe: its last words.
    """

    def __init__(self, show: Callable[[str], None]):
        self._show = show
        self._saved: dict[int, int] = {}
        self._is_drained = threading.Event()

    def start(self) -> None:
        """Begins."""
        self._saved = {number: os.dup(number) for number in (1, 2) if os.isatty(number)}
        self._read_end, write_end = os.pipe()
        alive, self._alive = os.pipe()
        self._heir = subprocess.Popen(
            ["sh", "-c", f"cat <&{alive}; exec cat"],
            stdin=self._read_end,
            pass_fds=[alive],
            start_new_session=True,  # Ctrl-C is not for it
        )
        os.close(alive)
        for number in self._saved:
            os.dup2(write_end, number)
        os.close(write_end)
        threading.Thread(target=self._read, name="terminal", daemon=True).start()

    def stop(self) -> None:
        """Shows what was written, and gives the terminal back. Children may write to the pipe until they end."""
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        for number, saved in self._saved.items():
            if number == max(self._saved):
                os.write(number, f"{_END}\n".encode())
            os.dup2(saved, number)
            os.close(saved)
        self._is_drained.wait(1.0)

    def _read(self) -> None:
        rest = b""
        while select.select([self._read_end], [], []):
            time.sleep(SECONDS_OF_DEATH)
            chunk = os.read(self._read_end, 1 << 16)
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                text = line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]  # of a bar, its last state
                if text := text.removesuffix(_END):
                    self._show(text)
                if line.endswith(_END.encode()):
                    self._is_drained.set()
            if not chunk:
                return


_END = "\0end"


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


def _describe(metrics: Metrics) -> list[str]:
    """One word group a column; together with step and time left they fit 80 characters."""
    columns = [column for column in _SHOWN if column[0] in metrics]
    columns = columns or [column for column in _SHOWN_WITHOUT_ROLLOUTS if column[0] in metrics]
    words = [f"{label} {float(metrics[name]):.{decimals}f}" for name, label, decimals in columns]
    if "learner/tokens_per_second" in metrics:
        speed = float(metrics["learner/tokens_per_second"])
        words.append(f"{speed:.0f} tok/s" if speed < 1e3 else f"{speed / 1e3:.1f}k tok/s")
    return words


def _time_left(first: tuple[int, float], last: tuple[int, float], total: int) -> str:
    steps, seconds = last[0] - first[0], last[1] - first[1]
    if steps <= 0:
        return "left -:--"
    left = round(seconds / steps * (total - last[0]))
    hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
    return f"left {hours}:{minutes:02}:{seconds:02}" if hours else f"left {minutes}:{seconds:02}"
