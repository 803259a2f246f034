"""The self-test of a sandbox tries what a program must not be able to do; the level of a sandbox is chosen by it."""

import json
import os

from oapl_jax.rewards.code.sandbox import isolation
from oapl_jax.rewards.code.sandbox.isolation import LEVELS, Unavailable
from oapl_jax.rewards.code.sandbox.sandbox import Ended, Limits, Sandbox, SandboxError, Settings, converse

_PROBE = """
import ctypes, fcntl, json, mmap, os, resource, socket, sys
def reopen():
    for number in range(64):
        try: return os.open(f"/proc/{os.getppid()}/fd/{number}", os.O_RDONLY | os.O_NONBLOCK)
        except OSError: pass
    raise OSError
def check(is_possible):
    if not is_possible: raise OSError
libc, possible = ctypes.CDLL(None), []
for name, attempt in json.load(sys.stdin).items():
    try: exec(attempt)
    except (OSError, ValueError, MemoryError): continue
    possible.append(name)
print(json.dumps(possible))
"""
"""The program that makes the attempts: those that raise nothing have succeeded."""
_ATTEMPTS = {
    "list processes": "os.listdir('/proc/1')",
    "open an internet socket": "socket.socket(socket.AF_INET)",
    "open a unix socket": "socket.socket(socket.AF_UNIX)",
    "start a process": "os.fork() or os._exit(0)",
    "start another program": "os.posix_spawn('/usr/bin/env', ['env'], {})",
    "trace its parent": "check(libc.ptrace(16, os.getppid(), 0, 0) >= 0)",
    "make a user namespace": "check(libc.unshare(0x10000000) >= 0)",
    "outlive its parent": "check(libc.prctl(1, 0, 0, 0, 0) >= 0)",  # PR_SET_PDEATHSIG
    "open a file of its parent": "reopen()",
    "open a datagram socket": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    # Nothing happens to a device; to a file of its own user it would.
    "empty a file that it may only read": "os.open(os.devnull, os.O_RDONLY | os.O_TRUNC)",
    "empty a file without a mode": "os.open(os.devnull, os.O_ACCMODE | os.O_TRUNC)",
    "raise its limits": "kind = resource.RLIMIT_NOFILE; n = resource.getrlimit(kind)[1] + 1; resource.setrlimit(kind, (n, n))",
    "take 8 GiB": "bytearray(8 << 30)",
    "share 8 GiB": "mmap.mmap(-1, 8 << 30)",
}
"""What a program must not be able to do, besides what depends on this process."""
_MANY_THREADS = """
import threading, time
threading.stack_size(1 << 16)
for _ in range(200):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
time.sleep(1)
"""
"""On a busy machine a start can take a tenth of a second; the first thread has to live when the last one starts."""
MAX_DRIVER_PID = 10
"""In its own process table the driver is one of the first processes."""
MAX_INSTALLED = 20
"""Files of installed packages that the self-test tries to read."""


class IsolationError(RuntimeError):
    """None of the levels that the config allows works on this machine."""


def open_sandbox(settings: Settings) -> Sandbox:
    """A worker of the strongest level that passes its self-test here, but none that is weaker than ``settings.level``."""
    reasons = []
    for level in LEVELS[: LEVELS.index(settings.level) + 1]:
        sandbox, reason = try_level(level, settings)
        if sandbox is not None:
            return sandbox
        reasons.append(f"{level}: {reason}")
    raise IsolationError(
        f"no sandbox of level {settings.level!r} or stronger works on this machine, so programs cannot be graded:\n  "
        + "\n  ".join(reasons)
        + "\npython -m oapl_jax check-sandbox shows which levels work; reward.isolation is the weakest level that is allowed"
    )


def try_level(level: str, settings: Settings) -> tuple[Sandbox | None, str]:
    """A worker of this level that passed its self-test; or None, and the reason."""
    try:
        sandbox = Sandbox(level, settings)
    except (Unavailable, RuntimeError, ValueError) as error:
        return None, str(error)
    try:
        holes = self_test(sandbox)
    except SandboxError as error:
        holes = [f"run the self-test ({error})"]
    if not holes:
        return sandbox, ""
    sandbox.close()
    return None, f"a program could {', '.join(holes)}" if "self-test" not in holes[0] else f"cannot {holes[0]}"


def self_test(sandbox: Sandbox) -> list[str]:
    """Names of the forbidden actions that a program can perform in this worker."""
    folders = isolation.installed_packages(os.path.dirname(os.__file__))
    installed = [entry.path for folder in folders for entry in os.scandir(folder) if entry.is_file()]
    files = [os.path.abspath(__file__), "/etc/passwd", "/proc/self/status", *installed[:MAX_INSTALLED]]
    folders = ["/tmp", "/var/tmp", "/dev/shm", "/", os.path.expanduser("~"), os.getcwd()]
    pids = [os.getpid(), os.getppid()]
    if sandbox.level == "namespaces":
        # The same pids name other processes inside the namespace, and /tmp is another folder.
        pids, folders = [], [folder for folder in folders if folder != "/tmp"]
    known = [*isolation.ENVIRONMENT, "PWD", "LC_CTYPE", "LD_LIBRARY_PATH", "TMPDIR"]
    attempts = {
        **{f"read {path}": f"open({path!r}, 'rb').read(1)" for path in files},
        **{f"write {folder}": f"p = {folder + '/oapl_jax_probe'!r}; open(p, 'wb'); os.unlink(p)" for folder in folders},
        **{f"signal process {pid}": f"os.kill({pid}, 0)" for pid in pids},
        **{f"signal process {pid} by fcntl": f"fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, {pid})" for pid in pids},
        "see the environment": f"check(set(os.environ) - set({known!r}))",
        **_ATTEMPTS,
    }
    child = _run(sandbox, _PROBE, json.dumps(attempts))
    if child.status != 0:
        raise SandboxError(f"exit {child.status}: {child.stderr.decode(errors='replace').strip()[-200:]}")
    holes = json.loads(child.stdout)
    if _run(sandbox, _MANY_THREADS, "").status == 0:
        holes.append("start 200 threads")
    if sandbox.level == "namespaces" and sandbox.info["pid"] > MAX_DRIVER_PID:
        holes.append("see processes outside")
    if sandbox.level == "uid" and sandbox.info["uid"] == os.getuid():
        holes.append("act under the grader's uid")
    return holes


def _run(sandbox: Sandbox, program: str, stdin: str) -> Ended:
    sandbox.start("script", program, Limits(), stdin=stdin)
    (child,) = converse([sandbox], Limits().wall_s)
    return child
