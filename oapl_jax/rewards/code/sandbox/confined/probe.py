"""The program of the self-test: it tries what a confined program must not be able to do, and prints what succeeded.

It runs in a worker's child like any other program. Its standard input is a JSON object: ``files`` that exist outside,
``folders`` to write to, ``pids`` of processes outside, ``environment``: the variables that may be set.
"""

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import resource
import socket
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1
CLONE_NEWUSER = 0x10000000
TOO_MUCH = 8 << 30


def main() -> None:
    """Prints the names of the attempts that succeeded, as a JSON array."""
    given = json.load(sys.stdin)
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result < 0:
            raise OSError(ctypes.get_errno())

    def read(path: str) -> None:
        with open(path, "rb") as file:
            file.read(1)

    def write(folder: str) -> None:
        path = f"{folder}/oapl_jax_probe_{os.getpid()}"
        with open(path, "wb") as file:
            file.write(b"x")
        os.unlink(path)

    def run(function: Callable[[], int]) -> None:
        pid = function()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)

    def own(pid: int) -> None:
        ours, _ = os.pipe()
        fcntl.fcntl(ours, fcntl.F_SETOWN, pid)

    def reopen() -> None:
        parent = f"/proc/{os.getppid()}/fd"
        for number in range(64):
            with contextlib.suppress(OSError):
                os.close(os.open(f"{parent}/{number}", os.O_RDONLY | os.O_NONBLOCK))
                return
        raise OSError("none can be opened")

    def raise_limit() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard + 1, hard + 1))
        except ValueError as error:
            raise OSError from error

    def leak() -> None:
        extra = set(os.environ) - set(given["environment"])
        if not extra:
            raise OSError("no other variables")

    attempts: dict[str, Callable[[], object]] = {
        **{f"read {path}": lambda path=path: read(path) for path in given["files"]},
        **{f"write {folder}": lambda folder=folder: write(folder) for folder in given["folders"]},
        **{f"signal process {pid}": lambda pid=pid: os.kill(pid, 0) for pid in given["pids"]},
        **{f"signal process {pid} by fcntl": lambda pid=pid: own(pid) for pid in given["pids"]},
        "list processes": lambda: os.listdir("/proc/1"),
        "open an internet socket": lambda: socket.socket(socket.AF_INET),
        "open a unix socket": lambda: socket.socket(socket.AF_UNIX),
        "start a process": lambda: run(os.fork),
        "start another program": lambda: run(lambda: os.posix_spawn("/usr/bin/env", ["env"], {})),
        "trace its parent": lambda: check(libc.ptrace(16, os.getppid(), 0, 0)),
        "make a user namespace": lambda: check(libc.unshare(CLONE_NEWUSER)),
        "outlive its parent": lambda: check(libc.prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)),
        "open a file of its parent": reopen,
        "open a datagram socket": lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM),
        # Nothing happens to a device; to a file of its own user it would.
        "empty a file that it may only read": lambda: os.open(os.devnull, os.O_RDONLY | os.O_TRUNC),
        "empty a file without a mode": lambda: os.open(os.devnull, os.O_ACCMODE | os.O_TRUNC),
        "raise its limits": raise_limit,
        "take 8 GiB": lambda: bytearray(TOO_MUCH),
        "share 8 GiB": lambda: mmap.mmap(-1, TOO_MUCH),
        "see the environment": leak,
    }
    possible = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except (OSError, MemoryError):
            continue
        possible.append(name)
    print(json.dumps(possible))


if __name__ == "__main__":
    main()
