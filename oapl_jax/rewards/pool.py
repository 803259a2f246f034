"""Killable grading processes: every task (``tasks.py``) gets a verdict in bounded time and memory.

Workers are plain ``python -m oapl_jax.rewards.worker`` programs on sockets, not ``multiprocessing``: a spawned
child would import the program that is running, and JAX with it. The parent measures each deadline and kills;
what a worker sends is one line of JSON, never a pickle. A worker that dies or is late is replaced and its
task tried again, after a pause that doubles; a task that has no retries left is invalid, which is no reward.
"""

import collections
import dataclasses
import json
import math
import os
import pathlib
import selectors
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from oapl_jax.rewards.setup import Setup
from oapl_jax.types import Grade, Verdict

START_TIMEOUT = 120.0
"""Seconds until a new worker must have imported Math-Verify (0.6 s of CPU); generous, for a busy machine."""
TASKS_PER_WORKER = 5000
"""Then the worker is replaced, which bounds whatever its libraries keep."""
FIRST_PAUSE = 0.5
"""Seconds before a task is tried for the second time."""
MAX_SEND_SECONDS = 10.0
MAX_REPLY = 1 << 16
KILL_TIMEOUT = 10.0
_PACKAGE_PARENT = str(pathlib.Path(__file__).resolve().parents[2])


class GraderPool:
    """A fixed number of grading processes, started at once and used by one calling thread at a time."""

    def __init__(self, workers: int, retries: int, setup: Setup) -> None:
        """Starts the workers without waiting for them.

        Args:
            workers: number of processes.
            retries: further attempts for a task whose worker died, was late, or failed.
            setup: what the workers grade.
        """
        self._setup, self._retries = setup, retries
        self._lock = threading.Lock()
        self._workers = [_Worker(setup) for _ in range(workers)]
        # Also runs at exit and when the pool is forgotten; the list is shared so that replacements are covered.
        self._finalizer = weakref.finalize(self, _kill_all, self._workers)

    def __enter__(self) -> "GraderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills the workers; may be called twice."""
        self._finalizer()

    @property
    def pids(self) -> list[int]:
        """Process ids of the present workers."""
        return [worker.process.pid for worker in self._workers]

    def grade(self, tasks: Sequence[dict[str, Any]], on_done: Callable[[int], None] | None = None) -> list[Grade]:
        """Grades of tasks, in their order.

        Args:
            tasks: as ``tasks.py`` makes them; each has its ``timeout``.
            on_done: is told how many are settled, whenever that has changed.

        Raises:
            RuntimeError: where the pool is closed, or a worker cannot even start.
        """
        with self._lock:
            if not self._finalizer.alive:
                raise RuntimeError("the grading pool is closed")
            batch = _Batch(tasks, self._retries)
            while batch.num_open:
                num_open = batch.num_open
                self._assign(batch)
                self._wait(batch)
                for place, worker in enumerate(self._workers):
                    self._collect(place, worker, batch)
                if on_done is not None and batch.num_open < num_open:
                    on_done(len(tasks) - batch.num_open)
            return batch.grades

    def _assign(self, batch: "_Batch") -> None:
        for worker in self._workers:
            if worker.is_idle and (task := batch.take()) is not None:
                worker.submit(task, batch.tasks[task])

    def _wait(self, batch: "_Batch") -> None:
        """Until a busy worker has something to say, or its deadline has come, or that of a pause."""
        busy = [worker for worker in self._workers if not worker.is_idle]
        wake_at = [worker.deadline for worker in busy]
        if len(busy) < len(self._workers) and batch.waiting:
            wake_at.append(min(ready_at for ready_at, _ in batch.waiting))
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.channel, selectors.EVENT_READ)
            selector.select(max(0.0, min(wake_at) - time.monotonic()))

    def _collect(self, place: int, worker: "_Worker", batch: "_Batch") -> None:
        """Takes the worker's reply if there is one; replaces the worker if it is dead, late or old."""
        if worker.is_idle:
            return
        reply = worker.receive()
        task = worker.task
        if reply is not None:
            worker.task, worker.deadline = None, float("inf")
            if task is not None:
                batch.settle(task, Grade(**{**reply, "verdict": Verdict(reply["verdict"])}))
        elif worker.is_dead or time.monotonic() >= worker.deadline:
            late = "" if task is None else f"no verdict in {batch.tasks[task]['timeout']:g} s"
            reason = "worker died" if worker.is_dead else late
            if not worker.is_ready:
                raise RuntimeError(
                    f"a grading worker did not start within {START_TIMEOUT:g} s or died; see its error above"
                )
            if task is not None:
                batch.settle(task, Grade(Verdict.INVALID, math.nan, reason))
            self._replace(place)
            return
        if worker.is_idle and worker.num_done >= TASKS_PER_WORKER:
            self._replace(place)

    def _replace(self, place: int) -> None:
        self._workers[place].kill()
        self._workers[place] = _Worker(self._setup)


class _Batch:
    """The tasks of one call: which wait, until when, and which are settled."""

    def __init__(self, tasks: Sequence[dict[str, Any]], retries: int) -> None:
        self.tasks, self._retries = tasks, retries
        self.waiting = collections.deque((0.0, task) for task in range(len(tasks)))
        self.num_open = len(tasks)
        self.grades = [Grade(Verdict.INVALID, math.nan, "not graded")] * len(tasks)
        self._attempts = [0] * len(tasks)

    def take(self) -> int | None:
        """The next task whose pause is over."""
        for place, (ready_at, task) in enumerate(self.waiting):
            if ready_at <= time.monotonic():
                del self.waiting[place]
                return task
        return None

    def settle(self, task: int, grade: Grade) -> None:
        """Keeps the grade, or puts the task back where the grader failed and there are retries left."""
        self._attempts[task] += 1
        attempts = self._attempts[task]
        if grade.verdict is Verdict.INVALID and attempts <= self._retries:
            self.waiting.append((time.monotonic() + FIRST_PAUSE * 2 ** (attempts - 1), task))
            return
        self.grades[task] = grade
        self.num_open -= 1


class _Worker:
    """One grading process and the state of our talk with it."""

    def __init__(self, setup: Setup) -> None:
        self.channel, theirs = socket.socketpair()
        search_path = os.pathsep.join(filter(None, [_PACKAGE_PARENT, os.environ.get("PYTHONPATH")]))
        # -P: the folder we happen to run in must not shadow a library.
        arguments = json.dumps(dataclasses.asdict(setup))
        command = [sys.executable, "-P", "-m", "oapl_jax.rewards.worker", arguments]
        with theirs:
            self.process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": search_path},
            )
        self._received = b""
        self.task: int | None = None
        self.deadline = time.monotonic() + START_TIMEOUT
        self.is_ready = False
        self.is_dead = False
        self.num_done = 0

    @property
    def is_idle(self) -> bool:
        """Ready, and without a task."""
        return self.is_ready and self.task is None

    def submit(self, number: int, task: dict[str, Any]) -> None:
        """Sends a task; a worker that cannot take it before the deadline counts as dead."""
        self.task, self.deadline = number, time.monotonic() + task["timeout"]
        self.channel.settimeout(min(task["timeout"], MAX_SEND_SECONDS))
        try:
            self.channel.sendall(json.dumps(task).encode() + b"\n")
        except OSError:
            self.is_dead = True

    def receive(self) -> dict[str, Any] | None:
        """A whole reply if one has come; never waits."""
        self.channel.setblocking(False)
        try:
            data = self.channel.recv(MAX_REPLY)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        self._received += data
        if not data or len(self._received) > MAX_REPLY:
            self.is_dead = True
            return None
        line, newline, self._received = self._received.partition(b"\n")
        if not newline:
            self._received = line
            return None
        if not self.is_ready:
            self.is_ready = True
        else:
            self.num_done += 1
        return json.loads(line)

    def kill(self) -> None:
        """Ends the process and waits until it is gone."""
        self.process.kill()
        self.channel.close()
        self.process.wait(KILL_TIMEOUT)


def _kill_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.kill()
