"""How strongly a worker is shut off: the levels, what each needs of the machine, and how one is started.

``namespaces``  bubblewrap: user, pid, network, ipc, uts and mount namespaces; of the file system only libraries
                are there, read-only; no /proc. Landlock on top where the kernel has it.
``uid``         no namespaces (many pods forbid them): a uid of its own, and Landlock for files and TCP. Path names
                can be probed. Needs root.
``landlock``    the grader's own uid, and Landlock. As above; only the seccomp filter stands before signals.

At every level each child has resource limits and the seccomp filter. There is no level without.
"""

import functools
import importlib.util
import json
import os
import pathlib
import shutil
import stat
import subprocess
import sys
from typing import Any, NamedTuple

LEVELS = ("namespaces", "uid", "landlock")
"""Strongest first."""
FIRST_UID, NUM_UIDS = 60_000, 5_000
"""Uids of workers where the grader is root; Debian gives these to nobody."""
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",  # rewards have to be reproducible
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "LC_ALL": "C.UTF-8",
    "PATH": "/usr/bin",
    "HOME": "/",
}
_LIBRARIES = ("/usr/lib", "/usr/lib64", "/usr/share/zoneinfo")
_ROOT_LIBRARIES = ("/lib", "/lib64", "/lib32")
_ASK_PATHS = (
    "import json, os, sys, sysconfig as s; print(json.dumps([os.path.realpath(sys.executable), os.path.dirname(os.__file__),"
    " os.path.join(s.get_config_var('LIBDIR') or '', s.get_config_var('INSTSONAME') or ''), sys.version_info[:2]]))"
)
ASK_TIMEOUT = 60.0


class Unavailable(Exception):  # noqa: N818 (it is a finding, not yet an error)
    """A level that this machine does not offer, and why."""


class Interpreter(NamedTuple):
    """The Python that programs run on."""

    executable: str
    stdlib: str
    paths: tuple[str, ...]
    """What has to be readable for it, system libraries aside."""


class Launch(NamedTuple):
    """How a worker is started."""

    command: list[str]
    options: dict[str, Any]
    """Of ``subprocess.Popen``."""
    readable: list[str]
    """Paths that Landlock leaves."""
    site: list[str]
    """Additions to ``sys.path``."""


def is_root() -> bool:
    """Whether workers are started under uids of their own."""
    return os.getuid() == 0


@functools.cache
def find_interpreter(wanted: str | None) -> Interpreter:
    """The interpreter of this process, or the one that is wanted; a system one where uids of workers cannot reach it.

    Raises:
        ValueError: where there is none of the same version that they can reach.
    """
    ours = _ask(wanted or sys.executable)
    if not is_root() or all(map(_is_public, ours.paths)):
        return ours
    system = shutil.which(f"python{sys.version_info[0]}.{sys.version_info[1]}", path="/usr/bin:/usr/local/bin")
    found = _ask(system) if system and wanted is None else None
    if found is None or not all(map(_is_public, found.paths)):
        private = next(path for path in ours.paths if not _is_public(path))
        raise ValueError(
            f"programs are graded under another uid, which cannot reach the interpreter {private}; make its folders"
            f" readable for others (chmod o+rx), install python{sys.version_info[0]}.{sys.version_info[1]} in /usr, or"
            f" name one in reward.python"
        )
    return found


def _ask(executable: str) -> Interpreter:
    try:
        output = subprocess.check_output([executable, "-I", "-S", "-c", _ASK_PATHS], timeout=ASK_TIMEOUT)
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"the interpreter {executable!r} of sandboxed programs does not run: {error}") from error
    real, stdlib, shared, version = json.loads(output)
    if tuple(version) != sys.version_info[:2]:
        wanted = ".".join(map(str, sys.version_info[:2]))
        raise ValueError(f"reward.python={executable!r}: has version {'.'.join(map(str, version))}, not {wanted}")
    paths = (real, stdlib, *([shared] if shared.endswith(".so") or ".so." in shared else []))
    return Interpreter(real, stdlib, tuple(path for path in paths if os.path.exists(path)))


def _is_public(path: str) -> bool:
    """Whether any uid can read it."""
    real = pathlib.Path(path).resolve()
    folders = all(parent.stat().st_mode & stat.S_IXOTH for parent in real.parents)
    return folders and bool(real.stat().st_mode & stat.S_IROTH)


def package_paths(packages: tuple[str, ...]) -> list[str]:
    """Where the packages to preload are, with the shared libraries that wheels put beside them.

    Raises:
        ValueError: naming a package that is not installed.
    """
    paths = []
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ValueError(f"reward.packages: {name!r} is not installed; pip install it, or take it off the list")
        place = pathlib.Path((spec.submodule_search_locations or [spec.origin or ""])[0])
        paths += [str(path) for path in (place, place.with_name(f"{name}.libs")) if path.exists()]
    return paths


def prepare(level: str, interpreter: Interpreter, packages: tuple[str, ...], socket_fd: int, source: str) -> Launch:
    """The command that starts a worker of this level.

    Raises:
        Unavailable: where something that the level needs is not there.
    """
    extra = package_paths(packages)
    libraries = [path for path in _LIBRARIES if os.path.isdir(path)]
    python = [interpreter.executable, "-I", "-S", "-B", "-c", source, str(socket_fd)]
    # Inside there is no cache of where shared libraries are.
    shared = interpreter.paths[2:]
    environment = {**ENVIRONMENT, "LD_LIBRARY_PATH": os.path.dirname(shared[0])} if shared else ENVIRONMENT
    options: dict[str, Any] = {"env": environment, "cwd": "/", "start_new_session": True, "pass_fds": [socket_fd]}
    if level == "uid" and not is_root():
        raise Unavailable("needs root, to give workers a uid of their own")
    if is_root() and level != "landlock":
        uid = FIRST_UID + os.getpid() % NUM_UIDS
        options |= {"user": uid, "group": uid, "extra_groups": []}
    if level == "namespaces":
        python = [*_bubblewrap([*libraries, *interpreter.paths], extra, interpreter, environment), *python]
    choom = shutil.which("choom")  # where memory runs out, a program is to go first
    readable = [*libraries, *_ROOT_LIBRARIES, *interpreter.paths, *extra, os.devnull, "/dev/urandom"]
    site = sorted({os.path.dirname(path) for path in extra})
    return Launch([choom, "-n", "1000", "--", *python] if choom else python, options, readable, site)


def _bubblewrap(
    paths: list[str], packages: list[str], interpreter: Interpreter, environment: dict[str, str]
) -> list[str]:
    program = shutil.which("bwrap")
    if program is None:
        raise Unavailable("bubblewrap is not installed; on Debian and Ubuntu: apt-get install bubblewrap")
    command = [program, "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    for name, value in environment.items():
        command += ["--setenv", name, value]
    for path in paths:  # not /usr/local: what is installed there may hold data
        command += ["--ro-bind", path, path]
    # Of the installed packages only those that are wanted, wherever they are.
    installed = os.path.join(interpreter.stdlib, "site-packages")
    covered = [installed] if os.path.isdir(installed) else []
    command += [word for folder in covered for word in ("--tmpfs", folder)]
    command += [word for path in packages for word in ("--ro-bind", path, path)]
    command += [word for folder in covered for word in ("--remount-ro", folder)]
    for path in _ROOT_LIBRARIES:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            command += ["--ro-bind", path, path]
    # No /proc: Python does without, and a stock pod forbids to mount it.
    return [*command, "--dev-bind", os.devnull, os.devnull, "--remount-ro", "/", "--chdir", "/", "--"]
