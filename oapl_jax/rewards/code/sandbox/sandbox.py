"""A sandbox: a warm worker that runs programs, each in a confined child of its own.

This is the grader's side. The worker runs ``confined/driver.py`` and is started by ``isolation.py``. A child gets its
source and its standard input as sealed memory files and answers on pipes. The output of a child is never trusted: it is
data of limited size, and the exit status can only explain why some of it is missing.

A sandbox belongs to one process. When that process ends, the control socket closes, and the worker ends too.
"""

import contextlib
import dataclasses
import fcntl
import importlib.resources
import json
import math
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from oapl_jax.rewards.code.sandbox import isolation
from oapl_jax.rewards.code.sandbox.isolation import Unavailable
from oapl_jax.rewards.code.sandbox.seccomp import compile_filter

START_TIMEOUT = 60.0
KILL_TIMEOUT = 5.0
"""Seconds in which a worker must report the end of a child that it was told to kill."""
STALL_SECONDS = 2.0
"""If a wait lasts this much longer than requested, the machine or its clock is at fault, not the program."""
MAX_STDERR = 1 << 20
KEPT_STDERR = 4096
CPU_MARGIN = 1.25
"""The kernel's limit counts ticks, which can run ahead of the CPU time that it reports. The reported time decides."""
MAX_TASKS = 64
"""Most threads of a program."""
SLACK_MB = 32
"""Memory beyond a program's limit and what the worker itself has, for modules that it loads, and for its stack."""
NEWEST_LANDLOCK = 99
_CONFINED = "oapl_jax.rewards.code.sandbox.confined"


class SandboxError(Exception):
    """The sandbox failed, not the program, so there is no verdict."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one run of a program."""

    cpu_s: float = 6.0
    wall_s: float = 12.0
    memory_mb: int = 1024
    output_kb: int = 1024
    """Standard output beyond the length of the right answer."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a worker."""

    level: str = "namespaces"
    """The weakest level that is accepted."""
    packages: tuple[str, ...] = ()
    """Packages that are imported before the first program and that all programs can read."""
    python: str | None = None
    """Interpreter of programs; None: that of this process."""
    landlock_abi: int = NEWEST_LANDLOCK
    """Newest version of Landlock to use; tests lower it to imitate an older kernel."""


class Child:
    """One run of a program: its output so far, and how it ended."""

    def __init__(self, name: int, pipes: dict[str, int], max_output: int) -> None:
        self.name, self.pipes = name, pipes
        self.stdout, self.stderr = bytearray(), bytearray()
        self.killed_for = ""
        """Why it was killed: ``time``, ``output``, or by the worker for ``files`` or ``threads``; empty if it was not."""
        self.is_done = False
        self.status = 0
        self.cpu_s = 0.0
        self._left = {"stdout": max_output, "stderr": MAX_STDERR}

    def receive(self, pipe: str, data: bytes) -> bool:
        """Takes data from a pipe; returns False if that exceeds the limit."""
        self._left[pipe] -= len(data)
        if pipe == "stderr":
            self.stderr += data
            del self.stderr[:-KEPT_STDERR]
        elif self._left[pipe] >= 0:
            self.stdout += data
        return self._left[pipe] >= 0

    def close(self) -> None:
        """Closes our ends of the pipes."""
        while self.pipes:
            os.close(self.pipes.popitem()[1])


class Sandbox:
    """One worker of a given isolation level."""

    def __init__(self, level: str, settings: Settings) -> None:
        """Starts the worker and waits until it is confined and warm.

        Raises:
            Unavailable: it does not start; the message has the last line of its error output.
        """
        self.level = level
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._next_name = 0
        interpreter = isolation.find_interpreter(settings.python)
        errors = os.memfd_create("stderr")
        try:
            with theirs:
                driver = read_confined("driver")
                launch = isolation.prepare(level, interpreter, settings.packages, theirs.fileno(), driver)
                self._folder = launch.folder
                self.process = subprocess.Popen(
                    launch.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, **launch.options
                )
            self.info = self._greet(launch, settings)
        except (OSError, ValueError, Unavailable) as error:
            said = os.pread(errors, KEPT_STDERR, 0).decode(errors="replace").strip().splitlines()
            self.close()
            raise Unavailable(said[-1] if said else str(error) or type(error).__name__) from error
        finally:
            os.close(errors)

    def _greet(self, launch: isolation.Launch, settings: Settings) -> dict[str, Any]:
        names = _CONFINED.split(".")
        modules = [(".".join(names[: i + 1]), "") for i in range(len(names))]
        modules += [(f"{_CONFINED}.{name}", read_confined(name)) for name in ("values", "calls", "program")]
        hello = {**launch.hello, "landlock_abi": settings.landlock_abi, "modules": modules}
        instructions = _memory_file(compile_filter())
        try:
            socket.send_fds(self._control, [json.dumps(hello).encode()], [instructions])
        finally:
            os.close(instructions)
        self._control.settimeout(START_TIMEOUT)
        answer = self._control.recv(1 << 16)
        if not answer:
            raise OSError("the worker ended")
        self._control.settimeout(KILL_TIMEOUT)
        return json.loads(answer)

    def start(
        self,
        mode: str,
        source: str,
        limits: Limits,
        *,
        stdin: str = "",
        expected: int = 0,
        remote: Sequence[str] = (),
        channel: Sequence[int] = (),
    ) -> Child:
        """Starts a child in a mode of ``confined/program.py``; ``converse`` then runs it to its end.

        ``expected`` is the length of the right output; ``remote`` are the names of the program that its tests use;
        ``channel`` are two pipes of a program and its tests: one to write to the other child, one to read from it.

        Raises:
            SandboxError: it cannot be started.
        """
        mine: dict[str, int] = {}
        given: list[int] = []
        try:
            if os.listdir(self._folder):
                self._remove_files()
            given.append(_memory_file(stdin.encode("utf-8", "surrogatepass")))
            for pipe in ("stdout", "stderr"):
                mine[pipe], end = os.pipe()
                given.append(end)
            given.append(_memory_file(source.encode("utf-8", "surrogatepass")))
            self._next_name += 1
            request = {"id": self._next_name, "mode": mode, "remote": list(remote)}
            request |= {"cpu_s": math.ceil(CPU_MARGIN * limits.cpu_s), "memory": (limits.memory_mb + SLACK_MB) << 20}
            # The kernel's limit counts all threads of a user. Where programs share their user, the worker counts.
            request["tasks"] = None if self.level == "landlock" else MAX_TASKS
            socket.send_fds(self._control, [json.dumps(request).encode()], [*given, *channel])
        except OSError as error:
            for descriptor in mine.values():
                os.close(descriptor)
            raise SandboxError(f"a run could not be started: {error}") from error
        finally:
            for descriptor in given:
                os.close(descriptor)
        for descriptor in mine.values():
            os.set_blocking(descriptor, False)
        return Child(self._next_name, mine, (limits.output_kb << 10) + 4 * expected)

    def kill(self, child: Child, reason: str) -> None:
        """Tells the worker to kill the child; ``take_end`` reports its end."""
        if not child.killed_for and not child.is_done:
            child.killed_for = reason
            try:
                self._control.send(b'{"kill": true}')
            except OSError as error:
                raise SandboxError(f"the sandbox's worker is gone: {error}") from error

    def fileno(self) -> int:
        """Readable when a child has ended."""
        return self._control.fileno()

    def take_end(self, child: Child) -> None:
        """Reads the worker's report of the child's end."""
        try:
            message = self._control.recv(1 << 16)
        except OSError as error:
            raise SandboxError(f"the sandbox's worker is gone: {error}") from error
        if not message:
            raise SandboxError("the sandbox's worker died")
        report = json.loads(message)
        if report["id"] != child.name:
            return
        child.is_done = True
        if report["failure"]:
            raise SandboxError(report["failure"])
        child.status, child.cpu_s = report["status"], report["cpu"]
        child.killed_for = child.killed_for or report["over"]

    def close(self) -> None:
        """Ends the worker and its child. It may be called twice."""
        self._control.close()
        if hasattr(self, "process"):
            try:
                self.process.wait(KILL_TIMEOUT)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(KILL_TIMEOUT)
        if hasattr(self, "_folder") and os.path.isdir(self._folder):
            self._remove_files()
            os.rmdir(self._folder)

    def _remove_files(self) -> None:
        """Removes the temporary files of a child that has ended; a path through its folders may be too long for Python."""
        script = 'chmod -R u+rwx "$0"; exec find "$0" -mindepth 1 -delete'
        subprocess.run(["/bin/sh", "-c", script, self._folder], stderr=subprocess.DEVNULL, timeout=START_TIMEOUT)


Runs = Sequence[tuple[Sandbox, Child]]


def converse(runs: Runs, wall_s: float) -> None:
    """Serves the pipes of children until all have ended; after ``wall_s`` seconds they are killed.

    Args:
        runs: the children, each in its own sandbox.
        wall_s: seconds for all of them together.

    Raises:
        SandboxError: the worker died, did not answer, or could not run the child; or the machine or its clock stalled.
    """
    deadline = time.monotonic() + wall_s
    give_up = float("inf")
    try:
        while open_runs := [(sandbox, child) for sandbox, child in runs if child.pipes or not child.is_done]:
            now = time.monotonic()
            if now > give_up:
                raise SandboxError(f"a killed child did not end within {KILL_TIMEOUT:g} s")
            if now > deadline and give_up == float("inf"):
                give_up = now + KILL_TIMEOUT
                for sandbox, child in open_runs:
                    sandbox.kill(child, "time")
            wait = max(0.0, min(deadline if give_up == float("inf") else give_up, now + 1.0) - now) + 0.001
            ready = _wait(open_runs, wait)
            # Only the wait is measured: what takes long after it is the program's own data.
            if (stalled := time.monotonic() - now - wait) > STALL_SECONDS:
                raise SandboxError(f"the machine or its clock jumped by {stalled:.1f} s")
            for event in ready:
                _serve(*event)
    finally:
        for _, child in runs:
            child.close()


def _wait(runs: Runs, wait: float) -> list[tuple[Sandbox, Child, str]]:
    """Waits once, and returns the pipes that are ready; ``end`` is the worker's report."""
    poll, sources = select.poll(), {}
    for sandbox, child in runs:
        if not child.is_done:
            poll.register(sandbox.fileno(), select.POLLIN)
            sources[sandbox.fileno()] = (sandbox, child, "end")
        for pipe, descriptor in child.pipes.items():
            poll.register(descriptor, select.POLLIN)
            sources[descriptor] = (sandbox, child, pipe)
    return [sources[descriptor] for descriptor, _ in poll.poll(wait * 1000)]


def _serve(sandbox: Sandbox, child: Child, pipe: str) -> None:
    """Serves a pipe that is ready."""
    if pipe == "end":
        sandbox.take_end(child)
    elif not (data := os.read(child.pipes[pipe], 1 << 18)):
        os.close(child.pipes.pop(pipe))
    elif not child.receive(pipe, data):
        sandbox.kill(child, "output")


def is_over_cpu(child: Child, limits: Limits) -> bool:
    """Whether the child used more CPU time than its limit, whether or not it was killed for that."""
    was_killed = child.status == -signal.SIGKILL and child.cpu_s > limits.cpu_s / CPU_MARGIN
    return child.status == -signal.SIGXCPU or was_killed or child.cpu_s > limits.cpu_s


def _memory_file(data: bytes) -> int:
    """A sealed memory file: nobody can change it, and it needs no disk."""
    descriptor = os.memfd_create("given", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        stack.pop_all()
    return descriptor


def read_confined(name: str) -> str:
    """The source of a module of ``confined/``."""
    return importlib.resources.files(_CONFINED).joinpath(f"{name}.py").read_text(encoding="utf-8")
