"""The self-test of a sandbox tries what a program must not be able to do; the level of a sandbox is chosen by it."""

import json
import os

from oapl_jax.rewards.code.sandbox import isolation
from oapl_jax.rewards.code.sandbox.isolation import LEVELS, Unavailable
from oapl_jax.rewards.code.sandbox.sandbox import (
    Child,
    Limits,
    Sandbox,
    SandboxError,
    Settings,
    converse,
    read_confined,
)

_MANY_THREADS = """
import threading, time
threading.stack_size(1 << 16)
for _ in range(200):
    threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
time.sleep(1)
"""
MAX_DRIVER_PID = 10
"""In its own process table the driver is one of the first processes."""
MAX_INSTALLED = 20
"""Files of installed packages that the self-test tries to read."""


class IsolationError(RuntimeError):
    """None of the levels that the config allows works on this machine."""


def open_sandbox(settings: Settings) -> Sandbox:
    """A worker of the strongest level that passes its self-test here; it is never weaker than ``settings.level``.

    Raises:
        IsolationError: no such level works; the message has the reason for each.
    """
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
    """Names of the forbidden actions that a program can perform in this worker.

    Raises:
        SandboxError: the self-test did not run.
    """
    folders = isolation.installed_packages(os.path.dirname(os.__file__))
    installed = [entry.path for folder in folders for entry in os.scandir(folder) if entry.is_file()]
    given = {
        "files": [os.path.abspath(__file__), "/etc/passwd", "/proc/self/status", *installed[:MAX_INSTALLED]],
        "folders": ["/tmp", "/var/tmp", "/dev/shm", "/", os.path.expanduser("~"), os.getcwd()],
        "pids": [os.getpid(), os.getppid()],
        "environment": [*isolation.ENVIRONMENT, "PWD", "LC_CTYPE", "LD_LIBRARY_PATH", "TMPDIR"],
    }
    if sandbox.level == "namespaces":
        # The same pids name other processes inside the namespace, and /tmp is another folder.
        given["pids"] = []
        given["folders"] = [folder for folder in given["folders"] if folder != "/tmp"]
    child = _run(sandbox, read_confined("probe"), json.dumps(given))
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


def _run(sandbox: Sandbox, program: str, stdin: str) -> Child:
    child = sandbox.start("script", program, Limits(), stdin=stdin)
    converse([(sandbox, child)], Limits().wall_s)
    return child
