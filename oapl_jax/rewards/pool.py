"""Killable grading processes: every answer gets a verdict in bounded time and memory.

Workers are plain ``python -m oapl_jax.rewards.worker`` programs on sockets, not ``multiprocessing``: a spawned
child would import the program that is running, and JAX with it. The parent measures each deadline and kills;
what a worker sends is one line of JSON, never a pickle. A worker that dies or is late is replaced and its
answer tried again; an answer that has no retries left is invalid, which is no reward at all.
"""

import collections
import dataclasses
import json
import os
import pathlib
import selectors
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence

from oapl_jax.types import Grade, Verdict

START_TIMEOUT = 120.0
"""Seconds until a new worker must have imported Math-Verify (0.6 s of CPU); generous, for a busy machine."""
TASKS_PER_WORKER = 5000
"""Then the worker is replaced, which bounds whatever its libraries keep."""
MAX_REPLY = 4096
KILL_TIMEOUT = 10.0
_PACKAGE_PARENT = str(pathlib.Path(__file__).resolve().parents[2])


class GraderPool:
    """A fixed number of grading processes, started at once and used by one calling thread at a time."""

    def __init__(self, workers: int, timeout: float, retries: int) -> None:
        """Starts the workers without waiting for them.

        Args:
            workers: number of processes.
            timeout: seconds that one answer may take.
            retries: further attempts for an answer whose worker died, was late, or failed.
        """
        self._timeout, self._retries = timeout, retries
        self._lock = threading.Lock()
        self._workers = [_Worker(timeout) for _ in range(workers)]
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

    def grade_many(self, items: Sequence[tuple[str, str]]) -> list[Grade]:
        """Grades of (gold answer, response) pairs, in their order.

        Raises:
            RuntimeError: where the pool is closed, or a worker cannot even start.
        """
        return [_grade(reply) for reply in self._run([list(item) for item in items])]

    def check_golds(self, golds: Sequence[str], row_names: Sequence[str]) -> None:
        """Checks that every gold answer can be compared with.

        Raises:
            ValueError: naming the rows (the first ten) whose gold answers do not parse.
        """
        replies = self._run([[gold] for gold in golds])
        broken = [(name, gold) for name, gold, (ok, _) in zip(row_names, golds, replies, strict=True) if not ok]
        if broken:
            listed = "\n  ".join(f"row {name}: {gold!r}" for name, gold in broken[:10])
            raise ValueError(f"{len(broken)} gold answers do not parse as mathematics:\n  {listed}")

    def _run(self, tasks: list[list[str]]) -> list[list]:
        """Replies to all tasks, in order, each [outcome, detail]."""
        with self._lock:
            if not self._finalizer.alive:
                raise RuntimeError("the grading pool is closed")
            batch = _Batch(tasks, self._retries)
            while batch.num_open:
                self._assign(batch)
                self._wait()
                for place, worker in enumerate(self._workers):
                    self._collect(place, worker, batch)
            return batch.replies

    def _assign(self, batch: "_Batch") -> None:
        for worker in self._workers:
            if batch.waiting and worker.is_idle:
                task = batch.waiting.popleft()
                worker.submit(task, batch.tasks[task])

    def _wait(self) -> None:
        """Until a busy worker has something to say, or its deadline has come."""
        busy = [worker for worker in self._workers if not worker.is_idle]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.channel, selectors.EVENT_READ)
            selector.select(max(0.0, min(worker.deadline for worker in busy) - time.monotonic()))

    def _collect(self, place: int, worker: "_Worker", batch: "_Batch") -> None:
        """Takes the worker's reply if there is one; replaces the worker if it is dead, late or old."""
        if worker.is_idle:
            return
        reply = worker.receive()
        task = worker.task
        if reply is not None:
            worker.task, worker.deadline = None, float("inf")
            if task is not None:
                batch.settle(task, reply)
        elif worker.is_dead or time.monotonic() >= worker.deadline:
            reason = "worker died" if worker.is_dead else f"no verdict in {self._timeout:g} s"
            if not worker.is_ready:
                raise RuntimeError(
                    f"a grading worker did not start within {START_TIMEOUT:g} s or died; see its error above"
                )
            if task is not None:
                batch.settle(task, [None, reason])
            self._replace(place)
            return
        if worker.is_idle and worker.num_done >= TASKS_PER_WORKER:
            self._replace(place)

    def _replace(self, place: int) -> None:
        self._workers[place].kill()
        self._workers[place] = _Worker(self._timeout)


@dataclasses.dataclass
class _Batch:
    """The tasks of one call: which wait, which are settled."""

    tasks: list[list[str]]
    retries: int

    def __post_init__(self) -> None:
        self.waiting = collections.deque(range(len(self.tasks)))
        self.num_open = len(self.tasks)
        self.replies: list[list] = [[None, "not graded"]] * len(self.tasks)
        self._attempts = [0] * len(self.tasks)

    def settle(self, task: int, reply: list) -> None:
        """Keeps the reply, or puts the task back where the grader failed and there are retries left."""
        self._attempts[task] += 1
        if reply[0] is None and self._attempts[task] <= self.retries:
            self.waiting.append(task)
            return
        self.replies[task] = reply
        self.num_open -= 1


class _Worker:
    """One grading process and the state of our talk with it."""

    def __init__(self, timeout: float) -> None:
        self.channel, theirs = socket.socketpair()
        search_path = os.pathsep.join(filter(None, [_PACKAGE_PARENT, os.environ.get("PYTHONPATH")]))
        # -P: the folder we happen to run in must not shadow a library.
        command = [sys.executable, "-P", "-m", "oapl_jax.rewards.worker", str(2 * timeout + 1)]
        with theirs:
            self.process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": search_path},
            )
        self._timeout = timeout
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

    def submit(self, task: int, words: list[str]) -> None:
        """Sends a task; a worker that cannot take it before the deadline counts as dead."""
        self.task, self.deadline = task, time.monotonic() + self._timeout
        self.channel.settimeout(self._timeout)
        try:
            self.channel.sendall(json.dumps(words).encode() + b"\n")
        except OSError:
            self.is_dead = True

    def receive(self) -> list | None:
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


def _grade(reply: list) -> Grade:
    outcome, detail = reply
    if outcome is None:
        return Grade(Verdict.INVALID, float("nan"), detail)
    return Grade(Verdict.CORRECT if outcome else Verdict.WRONG, float(outcome), detail)


def _kill_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.kill()
