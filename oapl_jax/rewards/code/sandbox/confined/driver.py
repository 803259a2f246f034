"""The program of a sandbox's worker: it confines itself, then forks one child per test.

It is trusted, so it never runs, parses or reads a program; the child does that, after the seccomp filter is in place.
It is started as ``python -I -S -B -c SOURCE DESCRIPTOR``. The control socket brings one ``hello``, then a request with
the child's descriptors for each test. The reply to a request says how the child ended. It exits when the socket closes.
"""

import array
import ctypes
import fcntl
import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
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

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Serves until the grader closes the socket."""
    control = socket.socket(fileno=int(sys.argv[1]))
    message, ancillary, _, _ = control.recvmsg(MAX_MESSAGE, socket.CMSG_SPACE(4))
    hello, (filter_fd,) = json.loads(message), _descriptors(ancillary)
    seccomp_filter = os.pread(filter_fd, MAX_MESSAGE, 0)
    os.close(filter_fd)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir("/")
    abi = _landlock(hello["readable"], hello["site"], hello["landlock_abi"])
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    sys.path[:] = [*filter(None, sys.path), *hello["site"]]
    names = _prepare(hello)
    control.send(json.dumps({"landlock": abi, "uid": os.getuid(), "pid": os.getpid()}).encode())
    children = _Children(control, seccomp_filter, names)
    while True:
        message, ancillary, _, _ = control.recvmsg(MAX_MESSAGE, socket.CMSG_SPACE(4 * CHILD_DESCRIPTORS))
        if not message:
            os._exit(0)
        request = json.loads(message)
        if "mode" in request:  # otherwise it is a kill that came too late
            control.send(json.dumps(children.run(request, _descriptors(ancillary))).encode())


def _prepare(hello: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Loads the child's modules and the packages to preload; returns the names that each mode starts with."""
    for name, source in hello["modules"]:
        module = types.ModuleType(name)
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
        exec(compile(source, f"<{name}>", "exec"), vars(module))
    for package in hello["packages"]:
        __import__(package)
    import _sitebuiltins
    import builtins

    # Python defines these in the site module, which -S leaves out.
    for name in ("exit", "quit"):
        setattr(builtins, name, _sitebuiltins.Quitter(name, ""))
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # pyright: ignore[reportAttributeAccessIssue]
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogatepass")  # pyright: ignore[reportAttributeAccessIssue]
    program = sys.modules["oapl_jax.rewards.code.sandbox.confined.program"]
    names = {mode: program.names_for(mode) for mode in program.MODES}
    gc.collect()
    gc.freeze()
    return names


def _landlock(readable: list[str], listable: list[str], max_abi: int) -> int:
    """Restricts this process to these paths, without TCP or signals to others; returns the Landlock ABI, or 0."""
    abi = min(libc.syscall(LANDLOCK_CREATE, None, 0, 1), max_abi)
    if abi < 1:
        return 0
    rights = (1 << 13) - 1 | (abi >= 2) << 13 | (abi >= 3) << 14 | (abi >= 5) << 15
    network, scopes = 3 if abi >= 4 else 0, 3 if abi >= 6 else 0
    attributes = struct.pack("<QQQ", rights, network, scopes)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = libc.syscall(LANDLOCK_CREATE, attributes, len(attributes), 0)
    if ruleset < 0:
        return 0
    execute, write, read, list_names = 1 << 0, 1 << 1, 1 << 2, 1 << 3
    for path in [*readable, *listable]:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        allowed = execute | read | (list_names if os.path.isdir(path) else 0)
        if path == os.devnull:
            allowed = read | write
        elif path not in readable:
            allowed = list_names
        rule = struct.pack("<Qi", allowed & rights, descriptor)
        libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0)
        os.close(descriptor)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    is_restricted = libc.syscall(LANDLOCK_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return abi if is_restricted else 0


class _Children:
    """Forks children, one at a time, and waits for them."""

    def __init__(self, control: socket.socket, seccomp_filter: bytes, names: dict[str, dict[str, Any]]) -> None:
        self._control, self._names = control, names
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
        # The child writes a byte once it is confined, before it reads the program. An exit status cannot report a
        # failure of the sandbox: a program could choose the same status to be excused.
        confined, confine = os.pipe()
        try:
            pid = os.fork()
        except OSError as error:
            for descriptor in (*descriptors, confined, confine):
                os.close(descriptor)
            return {"id": request["id"], "failure": f"fork: {error.strerror}"}
        if pid == 0:
            self._child(request, descriptors, confine)
        for descriptor in (*descriptors, confine):
            os.close(descriptor)
        status, usage, is_killed = self._wait(pid)
        was_confined = os.read(confined, 1) == b"1"
        os.close(confined)
        return {
            "id": request["id"],
            "failure": "" if was_confined or is_killed else "the child could not be confined",
            "status": os.waitstatus_to_exitcode(status),
            "cpu": usage.ru_utime + usage.ru_stime,
        }

    def _wait(self, pid: int) -> tuple[int, Any, bool]:
        is_killed = False
        while True:
            found, status, usage = os.wait4(pid, os.WNOHANG)
            if found:
                return status, usage, is_killed
            ready, _, _ = select.select([self._woken, self._control], [], [])
            if self._woken in ready:
                os.read(self._woken, 4096)
            if self._control in ready:
                message = self._control.recv(MAX_MESSAGE)
                os.kill(pid, signal.SIGKILL)  # the child has not been waited for, so the pid is still its own
                if not message:
                    os._exit(0)
                is_killed = True

    def _child(self, request: dict[str, Any], descriptors: list[int], confine: int) -> None:
        """The child's side of the fork; it never returns."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            # The descriptors move out of the way before they get their final numbers.
            high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, NUM_FILES) for descriptor in (*descriptors, confine)]
            for number, descriptor in enumerate(high[:-1]):
                os.dup2(descriptor, number)
            marker = CHILD_DESCRIPTORS
            os.dup2(high[-1], marker)
            os.closerange(len(descriptors), marker)
            os.closerange(marker + 1, MAX_FILES)
            _limit(request["limits"])
            if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, self._filter, 0, 0) == 0:
                os.write(marker, b"1")
                os.close(marker)
                source = _read_all(3)
                os.close(3)
                run = sys.modules["oapl_jax.rewards.code.sandbox.confined.program"].run
                status = run(request["mode"], source, self._names[request["mode"]], request["remote"])
        finally:
            os._exit(status)


def _read_all(descriptor: int) -> bytes:
    data = b""
    while piece := os.pread(descriptor, MAX_MESSAGE, len(data)):
        data += piece
    return data


def _limit(limits: dict[str, int]) -> None:
    """Sets soft and hard resource limits of a child; a hard limit that is already lower stays."""
    # SIGXCPU comes at the soft limit. SIGKILL follows a second later for programs that ignore it.
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_s"], limits["cpu_s"] + 1))
    wanted = {
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: NUM_FILES,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        RLIMIT_SIGPENDING: NUM_FILES,  # this also limits POSIX timers
        resource.RLIMIT_STACK: STACK_BYTES,
        resource.RLIMIT_DATA: limits["data"],
        resource.RLIMIT_AS: limits["address_space"],
        resource.RLIMIT_NPROC: limits["tasks"],
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _descriptors(ancillary: list) -> list[int]:
    return list(array.array("i", ancillary[0][2])) if ancillary else []


if __name__ == "__main__":
    main()
