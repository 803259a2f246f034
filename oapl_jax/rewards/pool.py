"""Grading processes that can be killed: every task (``tasks.py``) gets a verdict in bounded time and memory.

A worker is a ``python -m oapl_jax.rewards.worker`` program on a socket. It is not started by ``multiprocessing``, whose
child would import the running program, and JAX with it. A thread of this process gives it tasks, measures each deadline
and kills it when it is late. A worker replies with one line of JSON, never with a pickle. A worker that dies or is late
is replaced. Tasks without a verdict are tried again after a pause that doubles; one that is left without is invalid.

An answer cannot excuse itself. When a mathematical answer exhausts time or memory, only the child of its worker is
killed, and the next child judges a canary and the gold answer of the row. If it is quick, the answer is wrong.
"""

import contextlib
import json
import math
import os
import pathlib
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from oapl_jax.rewards.tasks import quick_tasks
from oapl_jax.rewards.worker import Setup
from oapl_jax.types import Grade, RunError, Verdict

START_TIMEOUT = 120.0
"""Seconds that a new worker may take to start (0.5 s of CPU on an idle machine)."""
PROBE_SECONDS = 1.0
"""Seconds after the kill of a child within which the next one has to judge the canary and the gold answer."""
PROBE_SHARE = 0.1
"""Share of its time limit in which each of them has to be judged, so that an answer is to blame."""
TASKS_PER_WORKER = 5000
"""Tasks after which a worker is replaced, so that leaks in its libraries stay bounded."""
FIRST_PAUSE = 0.5
"""Seconds before tasks are tried for the second time."""
MAX_REPLY = 1 << 20
KILL_TIMEOUT = 10.0
_PACKAGE_PARENT = str(pathlib.Path(__file__).resolve().parents[2])


class GraderPool(contextlib.AbstractContextManager):
    """A fixed number of grading processes, started at once."""

    def __init__(self, workers: int, retries: int, setup: Setup) -> None:
        """Starts the workers without waiting for them; ``retries`` are further attempts for a task without a verdict."""
        self._retries = retries
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[tuple[dict[str, Any], Future[list[Grade]]] | None] = queue.SimpleQueue()
        self._workers = [_Worker(setup, self._queue) for _ in range(workers)]
        # This also runs at exit, and when the pool is garbage-collected.
        self._finalizer = weakref.finalize(self, lambda workers: [worker.close() for worker in workers], self._workers)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills the workers. It may be called twice."""
        with self._lock:
            self._finalizer()

    def grade(self, tasks: Sequence[dict[str, Any]], on_done: Callable[[int], None] | None = None) -> list[Grade]:
        """Grades tasks and returns the grades of their responses in the same order.

        ``on_done`` is called with the number of finished tasks whenever it changes. Raises RuntimeError if the pool is
        closed, and RunError if a worker cannot start.
        """
        grades: dict[int, list[Grade]] = {}
        num_done, waiting = 0, [*range(len(tasks))]
        for attempt in range(self._retries + 1):
            if attempt and waiting:
                time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
            futures = [(number, self._submit(tasks[number])) for number in waiting]
            waiting = []
            for number, future in futures:
                grades[number] = future.result()
                if attempt < self._retries and any(each.verdict is Verdict.INVALID for each in grades[number]):
                    waiting.append(number)
                    continue
                num_done += 1
                if on_done is not None:
                    on_done(num_done)
        return [grade for number in range(len(tasks)) for grade in grades[number]]

    def _submit(self, task: dict[str, Any]) -> Future[list[Grade]]:
        future: Future[list[Grade]] = Future()
        with self._lock:
            if not self._finalizer.alive:
                raise RuntimeError("the grading pool is closed")
            self._queue.put((task, future))
        return future


class _Worker:
    """A grading process, replaced where it has to be, and the thread that gives it tasks."""

    def __init__(self, setup: Setup, tasks: queue.SimpleQueue) -> None:
        self._setup, self._tasks = setup, tasks
        self._is_closed = False
        self._start()
        threading.Thread(target=self._serve, name="grader", daemon=True).start()

    def close(self) -> None:
        """Ends the process and waits until it is gone; the thread then finds the end of the channel, or of the queue."""
        self._is_closed = True
        self._kill()
        self._tasks.put(None)

    def _start(self) -> None:
        self._channel, theirs = socket.socketpair()
        search_path = os.pathsep.join(filter(None, [_PACKAGE_PARENT, os.environ.get("PYTHONPATH")]))
        # -P: the current folder must not shadow a library.
        command = [sys.executable, "-P", "-m", "oapl_jax.rewards.worker", json.dumps(self._setup)]
        environment = {**os.environ, "PYTHONPATH": search_path}
        with theirs:
            self.process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, env=environment)
        self._received = b""
        self._num_done = 0
        self.child = 0
        """Process id of the child that serves the channel; 0 until the first one does."""
        if self._is_closed:
            self._kill()

    def _kill(self) -> None:
        self.process.kill()
        self.process.wait(KILL_TIMEOUT)

    def _replace(self) -> None:
        self._kill()
        self._channel.close()
        if not self._is_closed:
            self._start()

    def _serve(self) -> None:
        """The thread: grades tasks until the pool is closed."""
        while True:
            failure = self._wait_for_start()
            if (item := self._tasks.get()) is None:
                self._channel.close()
                return
            task, future = item
            try:
                if failure:
                    raise failure
                future.set_result(self._grade(task))
            except Exception as error:
                future.set_exception(error)

    def _wait_for_start(self) -> RunError | None:
        if self.child:
            return None
        try:
            self.child = self._receive(time.monotonic() + START_TIMEOUT)["child"]
        except (OSError, EOFError):
            return RunError(f"a grading worker did not start within {START_TIMEOUT:g} s or died; see its error above")
        return None

    def _grade(self, task: dict[str, Any]) -> list[Grade]:
        """The grades of the responses of a task, after one attempt."""
        self._num_done += 1
        reason = "worker died"
        try:
            reply = self._ask(task, task["timeout"])
            if "grades" in reply:
                if self._num_done >= TASKS_PER_WORKER:
                    self._replace()
                return [Grade(**part | {"verdict": Verdict(part["verdict"])}) for part in reply["grades"]]
            if "exhausted" in reply:  # the other reply is the greeting of a next child
                reason = f"out of {reply['exhausted']}"
        except TimeoutError:
            reason = f"no verdict in {task['timeout']:g} s"
        except (OSError, EOFError):
            pass
        if task["kind"] == "math" and reason != "worker died" and self._is_quick(quick_tasks(task)):
            return [Grade(Verdict.WRONG, 0.0, f"{reason}, unlike the gold answer")]
        self._replace()
        return [Grade(Verdict.INVALID, math.nan, reason)] * len(task.get("responses", (None,)))

    def _is_quick(self, answers: list[dict[str, Any]]) -> bool:
        """Kills the child; whether the next one judges these answers correct, each in a share of its time limit."""
        deadline = time.monotonic() + PROBE_SECONDS
        try:
            os.kill(self.child, signal.SIGKILL)
            while "child" not in (reply := self._receive(deadline)):
                pass
            self.child = reply["child"]
            seconds = [min(PROBE_SHARE * answer["timeout"], deadline - time.monotonic()) for answer in answers]
            replies = [self._ask(answer, limit) for answer, limit in zip(answers, seconds, strict=True)]
            return all(grade["verdict"] == Verdict.CORRECT for reply in replies for grade in reply["grades"])
        except (OSError, EOFError, KeyError):  # there are no grades if one of them exhausts the memory, too
            return False

    def _ask(self, task: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Sends a task and returns the reply; raises as ``_receive``."""
        deadline = time.monotonic() + seconds
        self._channel.settimeout(max(0.001, seconds))
        self._channel.sendall(json.dumps(task).encode() + b"\n")
        return self._receive(deadline)

    def _receive(self, deadline: float) -> dict[str, Any]:
        """The next reply; raises TimeoutError at the deadline, OSError or EOFError if there will be none."""
        while b"\n" not in self._received:
            self._channel.settimeout(max(0.001, deadline - time.monotonic()))
            data = self._channel.recv(MAX_REPLY)
            self._received += data
            if not data or len(self._received) > MAX_REPLY:
                raise EOFError
        line, _, self._received = self._received.partition(b"\n")
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise EOFError from error  # a killed child left half a line, or a function of the user wrote there
