"""The self-test of a sandbox, and the choice of a level by it: what a worker can really do, tried, not assumed."""

import json
import os

from oapl_jax.rewards.code.sandbox import isolation
from oapl_jax.rewards.code.sandbox.isolation import LEVELS, Unavailable
from oapl_jax.rewards.code.sandbox.sandbox import Limits, Sandbox, SandboxError, Settings, converse, read_confined

MAX_DRIVER_PID = 10
"""In a process table of its own the driver is one of the first."""


class IsolationError(RuntimeError):
    """No level that the config allows works on this machine."""


def open_sandbox(settings: Settings) -> Sandbox:
    """A worker of the strongest level that passes its self-test here, none weaker than ``settings.level``.

    Raises:
        IsolationError: with the reason for each level.
    """
    reasons = []
    for level in LEVELS[: LEVELS.index(settings.level) + 1]:
        sandbox, reason = try_level(level, settings)
        if sandbox is not None:
            return sandbox
        reasons.append(f"{level}: {reason}")
    raise IsolationError(
        f"no sandbox of level {settings.level!r} or stronger works on this machine, so no program is graded:\n  "
        + "\n  ".join(reasons)
        + "\npython -m oapl_jax check-sandbox shows what does; reward.isolation names the weakest level allowed"
    )


def try_level(level: str, settings: Settings) -> tuple[Sandbox | None, str]:
    """A worker of this level after its self-test, or None and what is wrong."""
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
    """What a program in this worker can do that it must not.

    Raises:
        SandboxError: where the test itself does not run.
    """
    given = {
        "files": [os.path.abspath(__file__), "/etc/passwd", "/proc/self/status"],
        "folders": ["/tmp", "/var/tmp", "/dev/shm", "/", os.path.expanduser("~"), os.getcwd()],
        "pids": [os.getpid(), os.getppid()],
        "environment": [*isolation.ENVIRONMENT, "PWD", "LC_CTYPE", "LD_LIBRARY_PATH"],
    }
    if sandbox.level == "namespaces":
        # Numbers of processes outside mean others inside.
        given["pids"] = []
    child = sandbox.start("script", read_confined("probe"), Limits(), stdin=json.dumps(given))
    converse([(sandbox, child)], Limits().wall_s)
    if child.status != 0:
        raise SandboxError(f"exit {child.status}: {child.stderr.decode(errors='replace').strip()[-200:]}")
    holes = json.loads(child.stdout)
    if sandbox.level == "namespaces" and sandbox.info["pid"] > MAX_DRIVER_PID:
        holes.append("see processes outside")
    if sandbox.level == "uid" and sandbox.info["uid"] == os.getuid():
        holes.append("act under the grader's uid")
    return holes
