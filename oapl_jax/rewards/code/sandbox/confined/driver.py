"""The program of a sandbox's worker: it confines itself, then forks one child per test.

It is trusted, so it never runs, parses or reads a program; the child does that, after the seccomp filter is in place.
It is started as ``python -I -S -B -c SOURCE DESCRIPTOR``. The control socket brings one ``hello``, then a request with
the child's descriptors for each test. The reply to a request says how the child ended. It exits when the socket closes.
"""

import ctypes
import fcntl
import gc
import json
import mmap
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
import types
from typing import Any

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
"""System call numbers; they are the same on every architecture."""
RLIMIT_SIGPENDING = 11
MAX_MESSAGE = 1 << 20
CHILD_DESCRIPTORS = 6
"""stdin, stdout, stderr, source, results, requests. The source is closed before the program begins."""
NUM_FILES, MAX_FILES = 64, 4096
"""Most descriptors of a child; a number above every descriptor of the driver."""
STACK_BYTES = 256 << 20
HUGE = 1 << 37
"""An address space that no worker fills."""
CAPABILITY_VERSION = 0x20080522
WATCH_SECONDS = 0.05
MAX_TEMPORARY_FILES, MAX_TEMPORARY = 500, 16 << 20
"""Number of temporary files and folders, and bytes of all."""

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Serves until the grader closes the socket."""
    # Everything that is opened gets a number above those that a child will use.
    control = socket.socket(fileno=fcntl.fcntl(int(sys.argv[1]), fcntl.F_DUPFD_CLOEXEC, CHILD_DESCRIPTORS + 2))
    while os.dup(0) < CHILD_DESCRIPTORS + 2:
        pass
    message, (filter_fd,), _, _ = socket.recv_fds(control, MAX_MESSAGE, 1)
    hello = json.loads(message)
    seccomp_filter = os.pread(filter_fd, MAX_MESSAGE, 0)
    os.close(filter_fd)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir("/")
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.capset(struct.pack("<Ii", CAPABILITY_VERSION, 0), bytes(24))
    # The driver counts threads in /proc; a child may not read it.
    abi, ruleset = _landlock(hello, ["/proc"])
    _restrict(ruleset)
    _, ruleset = _landlock(hello, [])
    sys.path[:] = [*filter(None, sys.path), *hello["site"]]
    names = _prepare(hello)
    control.send(json.dumps({"landlock": abi, "uid": os.getuid(), "pid": os.getpid()}).encode())
    children = _Children(control, seccomp_filter, names, ruleset, hello["folder"])
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, MAX_MESSAGE, CHILD_DESCRIPTORS)
        if not message:
            os._exit(0)
        request = json.loads(message)
        if "mode" in request:  # otherwise it is a kill that came too late
            control.send(json.dumps(children.run(request, descriptors)).encode())


def _prepare(hello: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Loads the child's modules and the packages to preload; returns the names that each mode starts with."""
    for name, source in hello["modules"]:
        module = sys.modules[name] = types.ModuleType(name)
        exec(compile(source, f"<{name}>", "exec"), vars(module))
    program = sys.modules["oapl_jax.rewards.code.sandbox.confined.program"]
    program.open_standard_files()  # before packages, which keep the functions that they find
    for package in hello["packages"]:
        __import__(package)
    import _sitebuiltins
    import builtins

    # Python defines these in the site module, which -S leaves out.
    for name in ("exit", "quit"):
        setattr(builtins, name, _sitebuiltins.Quitter(name, ""))
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # pyright: ignore[reportAttributeAccessIssue]
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogatepass")  # pyright: ignore[reportAttributeAccessIssue]
    names = {mode: program.names_for(mode) for mode in program.MODES}
    gc.collect()
    gc.freeze()
    return names


def _landlock(hello: dict[str, Any], also: list[str]) -> tuple[int, int]:
    """Makes a ruleset that allows these files and no TCP or signals; returns the ABI (0: no Landlock) and its descriptor."""
    abi = min(libc.syscall(LANDLOCK_CREATE, None, 0, 1), hello["landlock_abi"])
    if abi < 1:
        return 0, -1
    rights = (1 << 13) - 1 | (abi >= 2) << 13 | (abi >= 3) << 14 | (abi >= 5) << 15
    network, scopes = 3 if abi >= 4 else 0, 3 if abi >= 6 else 0
    attributes = struct.pack("<QQQ", rights, network, scopes)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = libc.syscall(LANDLOCK_CREATE, attributes, len(attributes), 0)
    execute, write, read, list_names, truncate = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
    changes = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 13 | truncate  # remove and make folders and files, and move them
    wanted = dict.fromkeys(hello["listable"], list_names)
    wanted |= dict.fromkeys([*hello["readable"], *also], execute | read | list_names)
    wanted |= {os.devnull: read | write, hello["folder"]: read | write | list_names | changes}
    for path, allowed in wanted.items():
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        of_files = execute | write | read | truncate
        rule = struct.pack("<Qi", allowed & rights & (-1 if os.path.isdir(path) else of_files), descriptor)
        libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0)
        os.close(descriptor)
    return abi, ruleset


def _restrict(ruleset: int) -> bool:
    """Adds a layer of Landlock; -1 stands for a kernel without it. A process cannot open files of one with fewer layers."""
    return ruleset < 0 or libc.syscall(LANDLOCK_RESTRICT, ruleset, 0) == 0


def _mapped_bytes() -> int:
    """The size of this process's address space: what a huge limit leaves of itself (there need not be a /proc)."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = HUGE if hard == resource.RLIM_INFINITY else min(HUGE, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    possible, too_much = 0, limit
    while too_much - possible > MAX_MESSAGE:
        size = (possible + too_much) // 2
        try:
            mmap.mmap(-1, size, mmap.MAP_PRIVATE, 0).close()
            possible = size
        except OSError:
            too_much = size
    return limit - possible


class _Children:
    """Forks children, one at a time, and waits for them."""

    def __init__(
        self, control: socket.socket, seccomp_filter: bytes, names: dict[str, dict[str, Any]], ruleset: int, folder: str
    ) -> None:
        self._control, self._names, self._ruleset, self._folder = control, names, ruleset, folder
        self._mapped = _mapped_bytes()
        self._instructions = ctypes.create_string_buffer(seccomp_filter, len(seccomp_filter))
        # struct sock_fprog: number of instructions of 8 bytes, pointer to them
        self._filter = struct.pack("HP", len(seccomp_filter) // 8, ctypes.addressof(self._instructions))
        self._woken, wake = os.pipe()
        for descriptor in (self._woken, wake):
            os.set_blocking(descriptor, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def run(self, request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """Runs one child to its end. It is killed if the grader says so or closes the socket."""
        try:
            if (pid := os.fork()) == 0:
                self._child(request, descriptors)
        except OSError as error:
            return {"failure": f"fork: {error.strerror}"}
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        status, usage, over = self._wait(pid, request)
        cpu_s = usage.ru_utime + usage.ru_stime
        return {"failure": "", "status": os.waitstatus_to_exitcode(status), "cpu": cpu_s, "over": over}

    def _wait(self, pid: int, request: dict[str, Any]) -> tuple[int, Any, str]:
        over, look_at = "", time.monotonic() + WATCH_SECONDS
        while True:
            found, status, usage = os.wait4(pid, os.WNOHANG)
            if found:
                return status, usage, over
            ready, _, _ = select.select([self._woken, self._control], [], [], WATCH_SECONDS)
            if self._woken in ready:
                os.read(self._woken, 4096)
            is_killed = self._control in ready
            if is_killed and not self._control.recv(MAX_MESSAGE):
                os.kill(pid, signal.SIGKILL)
                os._exit(0)
            # Not only when nothing is ready: a child that stops and goes on by its own timers wakes this process at any rate.
            if not over and time.monotonic() >= look_at:
                look_at = time.monotonic() + WATCH_SECONDS
                over = "files" if _is_full(self._folder) else ""
                if request["is_counting"] and len(os.listdir(f"/proc/{pid}/task")) > request["tasks"]:
                    over = "threads"
            if is_killed or over:
                os.kill(pid, signal.SIGKILL)  # the child has not been waited for, so the pid is still its own

    def _child(self, request: dict[str, Any], descriptors: list[int]) -> None:
        """The child's side of the fork; it never returns."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
            control = os.dup2(self._control.fileno(), CHILD_DESCRIPTORS)
            ruleset = os.dup2(max(self._ruleset, 0), CHILD_DESCRIPTORS + 1)
            os.closerange(len(descriptors), control)
            os.closerange(ruleset + 1, MAX_FILES)
            self._limit(request)
            # An exit status cannot report a failure of the sandbox: a program could choose it to be excused.
            is_confined = _restrict(ruleset if self._ruleset >= 0 else -1)
            if not is_confined or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, self._filter, 0, 0):
                os.write(control, b'{"failure": "the child could not be confined"}')
                os._exit(1)
            os.close(control)
            os.close(ruleset)
            with open(3, "rb") as file:
                source = file.read()
            run = sys.modules["oapl_jax.rewards.code.sandbox.confined.program"].run
            status = run(request["mode"], source, self._names[request["mode"]], request["remote"])
        finally:
            os._exit(status)

    def _limit(self, request: dict[str, Any]) -> None:
        """Sets soft and hard resource limits of a child; a hard limit that is already lower stays."""
        # SIGXCPU comes at the soft limit. SIGKILL follows a second later for programs that ignore it.
        resource.setrlimit(resource.RLIMIT_CPU, (request["cpu_s"], request["cpu_s"] + 1))
        wanted = {
            resource.RLIMIT_FSIZE: request["file"],
            resource.RLIMIT_NOFILE: NUM_FILES,
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_MSGQUEUE: 0,
            RLIMIT_SIGPENDING: NUM_FILES,  # this also limits POSIX timers
            resource.RLIMIT_STACK: STACK_BYTES,
            # The address space has everything that a program can map: heap, stacks, shared memory.
            resource.RLIMIT_AS: self._mapped + request["memory"],
            resource.RLIMIT_NPROC: HUGE if request["is_counting"] else request["tasks"],
        }
        for kind, value in wanted.items():
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            # Programs like to raise the limit of the stack. The address space limits it, too.
            resource.setrlimit(kind, (value, hard if kind == resource.RLIMIT_STACK else value))


def _is_full(folder: str) -> bool:
    """Whether a program has too many temporary files, or too large ones. Those without a name count as descriptors."""
    total, count, folders = 0, 0, [folder]
    try:
        for path in folders:
            for entry in os.scandir(path):
                count += 1
                total += entry.stat(follow_symlinks=False).st_size
                folders += [entry.path] * entry.is_dir(follow_symlinks=False)
                if count > MAX_TEMPORARY_FILES or total > MAX_TEMPORARY:
                    return True
    except OSError as error:  # removed in the meantime; or the path is too long, or a folder that nobody may read
        return not isinstance(error, FileNotFoundError)
    return False


if __name__ == "__main__":
    main()
