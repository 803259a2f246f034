"""Grading processes that can be killed: every task (``tasks.py``) gets a verdict in bounded time and memory.

A worker is a ``python -m oapl_jax.rewards.worker`` program on a socket. It is not started by ``multiprocessing``, whose
child would import the running program, and JAX with it. The parent measures each deadline and kills late workers. A
worker replies with one line of JSON, never with a pickle. A worker that dies or is late is replaced, and its task is
tried again after a pause that doubles. A task without retries left is invalid and has no reward.

An answer cannot excuse itself. When a mathematical answer exhausts time or memory, only the child of its worker is
killed, and the next child judges a canary and the gold answer of the row. If it is quick, the answer is wrong.
"""

import collections
import dataclasses
import json
import math
import os
import pathlib
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from oapl_jax.rewards.worker import Setup
from oapl_jax.types import Grade, RunError, Verdict

START_TIMEOUT = 120.0
"""Seconds that a new worker may take to start (0.5 s of CPU on an idle machine)."""
PROBE_SECONDS = 1.0
"""Seconds after the kill of a child within which the next one has to judge the canary and the gold answer."""
TASKS_PER_WORKER = 5000
"""Tasks after which a worker is replaced, so that leaks in its libraries stay bounded."""
FIRST_PAUSE = 0.5
"""Seconds before a task is tried for the second time."""
MAX_SEND_SECONDS = 10.0
MAX_REPLY = 1 << 20
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
        # This also runs at exit, and when the pool is garbage-collected. It shares the list, so it sees replacements.
        self._finalizer = weakref.finalize(self, _kill_all, self._workers)

    def __enter__(self) -> "GraderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills the workers. It may be called twice."""
        self._finalizer()

    @property
    def pids(self) -> list[int]:
        """Process ids of the present workers."""
        return [worker.process.pid for worker in self._workers]

    def grade(self, tasks: Sequence[dict[str, Any]], on_done: Callable[[int], None] | None = None) -> list[Grade]:
        """Grades tasks and returns the grades of their responses in the same order.

        Args:
            tasks: made by ``tasks.py``; each has its own ``timeout``.
            on_done: called with the number of finished tasks whenever it changes.

        Raises:
            RuntimeError: the pool is closed.
            RunError: a worker cannot start.
        """
        with self._lock:
            if not self._finalizer.alive:
                raise RuntimeError("the grading pool is closed")
            batch = _Batch(tasks, self._retries)
            while batch.num_open:
                num_open = batch.num_open
                self._assign(batch)
                self._wait(batch)
                for index, worker in enumerate(self._workers):
                    self._collect(index, worker, batch)
                if on_done is not None and batch.num_open < num_open:
                    on_done(len(tasks) - batch.num_open)
            return [grade for grades in batch.grades for grade in grades]

    def _assign(self, batch: "_Batch") -> None:
        for worker in self._workers:
            if worker.is_idle and (task := batch.take()) is not None:
                worker.submit(task, batch.tasks[task])

    def _wait(self, batch: "_Batch") -> None:
        """Waits until a busy worker replies, a worker's deadline passes, or a pause before a retry ends."""
        busy = [worker for worker in self._workers if not worker.is_idle]
        wake_at = [worker.deadline for worker in busy]
        if len(busy) < len(self._workers) and batch.waiting:
            wake_at.append(min(ready_at for ready_at, _ in batch.waiting))
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.channel, selectors.EVENT_READ)
            selector.select(max(0.0, min(wake_at) - time.monotonic()))

    def _collect(self, index: int, worker: "_Worker", batch: "_Batch") -> None:
        """Takes a worker's reply if one has come; replaces the worker if it is dead, late or old."""
        if worker.is_idle:
            return
        reply = worker.receive()
        task = worker.task
        if reply is not None and "child" in reply:
            self._greet(worker, reply["child"], batch)
        elif reply is not None and "exhausted" in reply:
            worker.expect_probe(f"out of {reply['exhausted']}")
        elif reply is not None and ("in_time" not in reply or worker.exhausted):
            worker.task, worker.deadline = None, float("inf")
            grades = _blamed(worker.exhausted, reply) if "in_time" in reply else _grades(reply)
            worker.exhausted = ""
            if task is not None:
                batch.settle(task, grades)
        elif reply is None and (worker.is_dead or time.monotonic() >= worker.deadline):
            reason = "worker died" if worker.is_dead else worker.exhausted or _late(batch, task)
            if not worker.is_ready:
                raise RunError(
                    f"a grading worker did not start within {START_TIMEOUT:g} s or died; see its error above"
                )
            if not worker.is_dead and not worker.exhausted and task is not None and "probe" in batch.tasks[task]:
                worker.expect_probe(reason)
                os.kill(worker.child, signal.SIGKILL)
                return
            if task is not None:
                batch.settle(task, [Grade(Verdict.INVALID, math.nan, reason)])
            self._replace(index)
            return
        if worker.is_idle and worker.num_done >= TASKS_PER_WORKER:
            self._replace(index)

    def _greet(self, worker: "_Worker", child: int, batch: "_Batch") -> None:
        """Notes the new child of a worker, and lets it judge a probe if an answer exhausted the one before it."""
        worker.child, task = child, worker.task
        if task is None:
            return
        if worker.exhausted:
            worker.send({"kind": "probe", "answers": batch.tasks[task]["probe"], "timeout": PROBE_SECONDS})
        else:
            worker.task, worker.deadline = None, float("inf")
            batch.settle(task, [Grade(Verdict.INVALID, math.nan, "worker died")])

    def _replace(self, index: int) -> None:
        self._workers[index].kill()
        self._workers[index] = _Worker(self._setup)


def _late(batch: "_Batch", task: int | None) -> str:
    return "" if task is None else f"no verdict in {batch.tasks[task]['timeout']:g} s"


def _grades(reply: dict[str, Any]) -> list[Grade]:
    return [Grade(**part | {"verdict": Verdict(part["verdict"])}) for part in reply.get("grades", [reply])]


def _blamed(reason: str, reply: dict[str, Any]) -> list[Grade]:
    """The grade of an answer that exhausted a worker: wrong if the worker then judged its probe in time."""
    if reply["in_time"]:
        return [Grade(Verdict.WRONG, 0.0, f"{reason}, unlike the gold answer")]
    return [Grade(Verdict.INVALID, math.nan, reason)]


class _Batch:
    """The tasks of one call to ``grade``: those that wait, with the time of their next attempt, and the grades."""

    def __init__(self, tasks: Sequence[dict[str, Any]], retries: int) -> None:
        self.tasks, self._retries = tasks, retries
        self.waiting = collections.deque((0.0, task) for task in range(len(tasks)))
        self.num_open = len(tasks)
        self.grades: list[list[Grade]] = [[] for _ in tasks]
        self._attempts = [0] * len(tasks)

    def take(self) -> int | None:
        """The next task whose pause is over."""
        for index, (ready_at, task) in enumerate(self.waiting):
            if ready_at <= time.monotonic():
                del self.waiting[index]
                return task
        return None

    def settle(self, task: int, grades: list[Grade]) -> None:
        """Keeps the grades (one counts for all responses), or queues the task again if retries are left."""
        self._attempts[task] += 1
        attempts = self._attempts[task]
        if any(grade.verdict is Verdict.INVALID for grade in grades) and attempts <= self._retries:
            self.waiting.append((time.monotonic() + FIRST_PAUSE * 2 ** (attempts - 1), task))
            return
        self.grades[task] = grades if len(grades) > 1 else grades * len(self.tasks[task].get("responses", (None,)))
        self.num_open -= 1


class _Worker:
    """One grading process and its task."""

    def __init__(self, setup: Setup) -> None:
        self.channel, theirs = socket.socketpair()
        search_path = os.pathsep.join(filter(None, [_PACKAGE_PARENT, os.environ.get("PYTHONPATH")]))
        # -P: the current folder must not shadow a library.
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
        self.child = 0
        """Process id of the child that serves the channel."""
        self.exhausted = ""
        """What the task has exhausted, while its probe runs."""

    @property
    def is_idle(self) -> bool:
        """Whether it has started and has no task."""
        return self.is_ready and self.task is None

    def submit(self, number: int, task: dict[str, Any]) -> None:
        """Sends a task. A worker that does not read it before the deadline counts as dead."""
        self.task, self.deadline = number, time.monotonic() + task["timeout"]
        self.exhausted = ""
        self.send(task)

    def expect_probe(self, reason: str) -> None:
        """Notes why the child ends, and when the next one has to have judged the probe."""
        self.exhausted, self.deadline = reason, time.monotonic() + PROBE_SECONDS

    def send(self, task: dict[str, Any]) -> None:
        """Sends a task."""
        self.channel.settimeout(min(task["timeout"], MAX_SEND_SECONDS))
        try:
            self.channel.sendall(json.dumps(task).encode() + b"\n")
        except OSError:
            self.is_dead = True

    def receive(self) -> dict[str, Any] | None:
        """The next reply, or None if no complete one has come; it never waits."""
        if b"\n" not in self._received:
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
        self.num_done += self.is_ready
        self.is_ready = True
        return json.loads(line)

    def kill(self) -> None:
        """Ends the process and waits until it is gone."""
        self.process.kill()
        self.channel.close()
        self.process.wait(KILL_TIMEOUT)


def _kill_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.kill()
