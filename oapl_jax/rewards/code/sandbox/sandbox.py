"""A sandbox: a warm worker that runs programs, each in a confined child of its own.

This is the grader's side. The worker runs ``confined/driver.py`` and is started by ``isolation.py``. A child gets its
source and its standard input as sealed memory files, and two more for its output. The output of a child is never trusted:
it is data of limited size, and the exit status can only explain why some of it is missing.

A sandbox belongs to one process. When that process ends, the control socket closes, and the worker ends too.
"""

import contextlib
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
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from oapl_jax.rewards.code.sandbox import isolation
from oapl_jax.rewards.code.sandbox.isolation import Unavailable
from oapl_jax.rewards.code.sandbox.seccomp import compile_filter

START_TIMEOUT = 60.0
KILL_TIMEOUT = 5.0
"""Seconds in which a worker must report the end of a child that it was told to kill."""
STALL_SECONDS = 2.0
"""If a wait lasts this much longer than requested, the machine or its clock is at fault, not the program."""
MAX_OUTPUT = 1 << 20
"""Standard output, and each temporary file, may have this many bytes, or the next multiple of it above four times the length
of the right output. A program can read its limit, which must not give away that length: YES is longer than NO."""
KEPT_STDERR = 4096
CPU_MARGIN = 1.25
"""The kernel's limit counts ticks, which can run ahead of the CPU time that it reports. The reported time decides."""
MAX_TASKS = 64
"""Most threads of a program."""
SLACK_MB = 32
"""Memory beyond a program's limit and what the worker itself has, for modules that it loads, and for its stack."""
_CONFINED = "oapl_jax.rewards.code.sandbox.confined"


class SandboxError(Exception):
    """The sandbox failed, not the program, so there is no verdict."""


class Limits(NamedTuple):
    """Limits of one run of a program."""

    cpu_s: float = 6.0
    wall_s: float = 12.0
    memory_mb: int = 1024


class Settings(NamedTuple):
    """Settings of a worker, as ``RewardConfig`` has them."""

    level: str = "namespaces"
    """The weakest level that is accepted."""
    packages: tuple[str, ...] = ()
    python: str | None = None
    landlock_abi: int = 99
    """Newest version of Landlock to use; tests lower it to imitate an older kernel."""


class Ended(NamedTuple):
    """How a run of a program ended."""

    status: int
    cpu_s: float
    killed_for: str
    """``time``; ``files`` or ``threads``, if there were too many; ``output``, if it was too long; empty if it was not."""
    stdout: bytes
    stderr: bytes
    """The end of it."""


class Sandbox:
    """One worker of a given isolation level."""

    def __init__(self, level: str, settings: Settings) -> None:
        """Starts the worker and waits until it is confined and warm; raises Unavailable where it does not start."""
        self.level, self._files = level, list[int]()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        errors = os.memfd_create("stderr")
        try:
            with theirs:
                given = (level, settings.python, settings.packages, theirs.fileno(), _source("driver"))
                command, options, self._folder, hello = isolation.prepare(*given)
                self.process = subprocess.Popen(command, stderr=errors, **options)
            names = ("values", "calls", "program")
            modules = [(_CONFINED, ""), *((f"{_CONFINED}.{name}", _source(name)) for name in names)]
            hello |= {"landlock_abi": settings.landlock_abi, "modules": modules}
            with _sealed_file(compile_filter()) as instructions:
                socket.send_fds(self._control, [json.dumps(hello).encode()], [instructions])
            self._control.settimeout(START_TIMEOUT)
            answer = self._control.recv(1 << 16)
            if not answer:
                raise OSError("the worker ended")
            self._control.settimeout(KILL_TIMEOUT)
            self.info = json.loads(answer)
        except (OSError, ValueError, Unavailable) as error:
            said = os.pread(errors, KEPT_STDERR, 0).decode(errors="replace").strip().splitlines()
            self.close()
            raise Unavailable(said[-1] if said else str(error) or type(error).__name__) from error
        finally:
            os.close(errors)

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
    ) -> None:
        """Starts a child in a mode of ``confined/program.py``; ``converse`` then runs it to its end.

        ``expected`` is the length of the right output; ``remote`` are the names of the program that its tests use;
        ``channel`` are two pipes of a program and its tests: one to write to the other child, one to read from it.
        """
        self._max_output, self._is_late = MAX_OUTPUT * (1 + 4 * expected // MAX_OUTPUT), False
        request = {"mode": mode, "remote": list(remote), "file": self._max_output}
        request |= {"cpu_s": math.ceil(CPU_MARGIN * limits.cpu_s), "memory": (limits.memory_mb + SLACK_MB) << 20}
        # The kernel's limit counts all threads of a user. Where programs share their user, the worker counts.
        request |= {"tasks": MAX_TASKS, "is_counting": self.level == "landlock"}
        encoded = [text.encode("utf-8", "surrogatepass") for text in (stdin, source)]
        try:
            if os.listdir(self._folder):
                self._remove_files()
            self._files += [os.memfd_create("stdout"), os.memfd_create("stderr")]
            with _sealed_file(encoded[0]) as given, _sealed_file(encoded[1]) as program:
                descriptors = [given, *self._files, program, *channel]
                socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
        except OSError as error:
            raise SandboxError(f"a run could not be started: {error}") from error

    def kill(self) -> None:
        """Tells the worker to kill the child, which is late; ``take_end`` reports its end."""
        self._is_late = True
        self._control.send(b'{"kill": true}')

    def fileno(self) -> int:
        """Readable when a child has ended, for ``select``."""
        return self._control.fileno()

    def take_end(self) -> Ended:
        """Reads the worker's report of the child's end, and its output."""
        message = self._control.recv(1 << 16)
        if not message:
            raise SandboxError("the sandbox's worker died")
        report = json.loads(message)
        if report["failure"]:
            raise SandboxError(report["failure"])
        sizes = [os.fstat(file).st_size for file in self._files]
        stdout = os.pread(self._files[0], self._max_output, 0)
        stderr = os.pread(self._files[1], KEPT_STDERR, max(0, sizes[1] - KEPT_STDERR))
        self._close_files()
        reason = "time" if self._is_late else report["over"]
        if not reason and max(sizes) >= self._max_output:
            reason = "output"
        return Ended(report["status"], report["cpu"], reason, stdout, stderr)

    def _close_files(self) -> None:
        while self._files:
            os.close(self._files.pop())

    def close(self) -> None:
        """Ends the worker and its child. It may be called twice."""
        self._close_files()
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


def converse(sandboxes: Sequence[Sandbox], wall_s: float) -> list[Ended]:
    """Waits until the children of these sandboxes have ended; after ``wall_s`` seconds they are killed.

    Raises a SandboxError if a worker died, did not answer or could not run its child, or the machine or its clock stalled.
    """
    deadline, is_late = time.monotonic() + wall_s, False
    ended: dict[Sandbox, Ended] = {}
    try:
        while waiting := [sandbox for sandbox in sandboxes if sandbox not in ended]:
            now = time.monotonic()
            if now > deadline and is_late:
                raise SandboxError(f"a killed child did not end within {KILL_TIMEOUT:g} s")
            if now > deadline:
                deadline, is_late = now + KILL_TIMEOUT, True
                for sandbox in waiting:
                    sandbox.kill()
            wait = min(deadline - now, 1.0) + 0.001
            ready, _, _ = select.select(waiting, [], [], wait)
            # Only the wait is measured: what takes long after it is the program's own data.
            if (stalled := time.monotonic() - now - wait) > STALL_SECONDS:
                raise SandboxError(f"the machine or its clock jumped by {stalled:.1f} s")
            ended |= {sandbox: sandbox.take_end() for sandbox in ready}
    except OSError as error:
        raise SandboxError(f"the sandbox's worker is gone: {error}") from error
    return [ended[sandbox] for sandbox in sandboxes]


@contextlib.contextmanager
def _sealed_file(data: bytes) -> Iterator[int]:
    """A sealed memory file: nobody can change it, and it needs no disk."""
    descriptor = os.memfd_create("given", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        file.seek(0)
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
        yield descriptor


def _source(name: str) -> str:
    """That of a module of ``confined/``."""
    return importlib.resources.files(_CONFINED).joinpath(f"{name}.py").read_text(encoding="utf-8")
