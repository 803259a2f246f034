"""The isolation levels of a sandbox, what each needs from the machine, and the command that starts a worker.

``namespaces``  bubblewrap makes user, pid, network, ipc, uts and mount namespaces. The file system has only libraries,
                read-only, and no /proc. Landlock is added if the kernel has it.
``uid``         for machines that forbid namespaces, as many pods do: the worker has a uid of its own, and Landlock
                guards files and TCP. Path names can be probed. It needs root.
``landlock``    as ``uid``, but with the grader's own uid: only the seccomp filter prevents signals, and the worker
                counts threads, because the kernel's limit would count those of all programs together.

Every child has resource limits, a layer of Landlock of its own where there is Landlock, and the seccomp filter at every
level. Programs never run without isolation. Each worker has a folder for temporary files, which is all that a program
can write to; the worker empties it after each child.
"""

import functools
import importlib.util
import itertools
import json
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import tempfile
from typing import Any

LEVELS = ("namespaces", "uid", "landlock")
"""Strongest first."""
FIRST_UID, NUM_UIDS, UIDS_OF_GRADER = 60_000, 5_000, 8
"""Range of the workers' uids if the grader is root; Debian leaves these unassigned. The kernel counts threads by uid."""
_worker_numbers = itertools.count()
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",  # rewards have to be reproducible
    "MALLOC_ARENA_MAX": "1",  # each further one would reserve 64 MiB of address space
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "LC_ALL": "C.UTF-8",
    "PATH": "/usr/bin",
    "HOME": "/",
}
_LIBRARIES = ("/usr/lib", "/usr/lib64", "/usr/share/zoneinfo")
_ROOT_LIBRARIES = ("/lib", "/lib64", "/lib32")
_PACKAGES = "/packages"
"""Where the level ``namespaces`` shows the packages to preload."""
_ASK_PATHS = (
    "import json, os, sys, sysconfig as s; print(json.dumps([os.path.realpath(sys.executable), os.path.dirname(os.__file__),"
    " os.path.join(s.get_config_var('LIBDIR') or '', s.get_config_var('INSTSONAME') or ''), sys.version_info[:2]]))"
)


class Unavailable(Exception):  # noqa: N818 (it is a finding, not yet an error)
    """This machine does not offer a level; the message says why."""


def is_root() -> bool:
    """Whether workers can have uids of their own."""
    return os.getuid() == 0


@functools.cache
def find_interpreter(wanted: str | None) -> list[str]:
    """Executable, library and, where there is one, shared library of an interpreter that the workers' uids can reach.

    It is the wanted one; by default that of this process, or else a system one. A ValueError says that there is none.
    """
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    system = None if wanted else shutil.which(name, path="/usr/bin:/usr/local/bin")
    private: list[str] = []
    for executable in filter(None, (wanted or sys.executable, system)):
        found = _ask(executable)
        private = [path for path in found if is_root() and not _is_public(path)]
        if not private:
            return found
    raise ValueError(
        f"programs run under another uid, which cannot reach the interpreter {private[0]}; make its folders readable for"
        f" others (chmod o+rx), install {name} in /usr, or name an interpreter in reward.python"
    )


def _ask(executable: str) -> list[str]:
    try:
        output = subprocess.check_output([executable, "-I", "-S", "-c", _ASK_PATHS], timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"the interpreter of sandboxed programs, {executable!r}, does not run: {error}") from error
    real, stdlib, shared, version = json.loads(output)
    if tuple(version) != sys.version_info[:2]:
        wanted = ".".join(map(str, sys.version_info[:2]))
        raise ValueError(f"reward.python={executable!r}: is Python {'.'.join(map(str, version))}, but must be {wanted}")
    return [real, stdlib, *([shared] if ".so" in shared and os.path.exists(shared) else [])]


def _is_public(path: str) -> bool:
    """Whether every uid can read a file."""
    real = pathlib.Path(path).resolve()
    folders = all(parent.stat().st_mode & stat.S_IXOTH for parent in real.parents)
    return folders and bool(real.stat().st_mode & stat.S_IROTH)


def _package_paths(packages: tuple[str, ...]) -> list[str]:
    """Paths of the packages to preload, with the shared libraries that wheels put beside them."""
    paths = []
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ValueError(
                f"reward.packages: {name!r} is not installed; install it with pip, or remove it from the list"
            )
        folder = pathlib.Path((spec.submodule_search_locations or [spec.origin or ""])[0])
        paths += [str(path) for path in (folder, folder.with_name(f"{name}.libs")) if path.exists()]
    return paths


def prepare(
    level: str, python: str | None, packages: tuple[str, ...], socket_fd: int, source: str
) -> tuple[list[str], dict[str, Any], str, dict[str, Any]]:
    """How a worker of this level is started; raises Unavailable where the machine lacks what the level needs.

    Returns the command, keyword arguments of ``subprocess.Popen``, the folder for temporary files, which is removed when
    the worker ends, and what the driver is told: files that Landlock leaves readable, folders whose names it leaves
    readable with those in the folders below, the folder inside the sandbox, additions to ``sys.path``, and packages.
    """
    if level == "uid" and not is_root():
        raise Unavailable("it needs root to give workers a uid of their own")
    bubblewrap = shutil.which("bwrap")
    if level == "namespaces" and not bubblewrap:
        raise Unavailable("bubblewrap is not installed; on Debian and Ubuntu: apt-get install bubblewrap")
    extra = _package_paths(packages)
    libraries = [path for path in _LIBRARIES if os.path.isdir(path)]
    executable, stdlib, *shared = find_interpreter(python)
    installed = installed_packages(stdlib)
    command = [executable, "-I", "-S", "-B", "-c", source, str(socket_fd)]
    options: dict[str, Any] = {"cwd": "/", "start_new_session": True, "pass_fds": [socket_fd]}
    options |= {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    folder = tempfile.mkdtemp(prefix="oapl_jax_sandbox_", dir="/tmp" if is_root() else None)
    if is_root() and level != "landlock":
        number = UIDS_OF_GRADER * os.getpid() + next(_worker_numbers) % UIDS_OF_GRADER
        uid = FIRST_UID + number % NUM_UIDS
        options |= {"user": uid, "group": uid, "extra_groups": []}
        os.chown(folder, uid, uid)
    environment = {**ENVIRONMENT, "TMPDIR": "/tmp" if level == "namespaces" else folder}
    if shared:  # the sandbox has no cache of the locations of shared libraries
        environment["LD_LIBRARY_PATH"] = os.path.dirname(shared[0])
    if level == "namespaces" and bubblewrap:
        visible = {path: path for path in (*libraries, executable, stdlib, *shared)}
        # Elsewhere than outside: those of an environment in /tmp would be among the program's temporary files.
        inside = {path: f"{_PACKAGES}/{os.path.basename(path)}" for path in extra}
        command = [bubblewrap, *_bubblewrap(visible | inside, installed, folder), *command]
        extra = [*inside.values()]
    choom = shutil.which("choom")  # when memory runs out, the kernel should kill programs first
    # Most of the libraries of / are links to those of /usr. A rule for a link would be one for all that it points to.
    roots = [path for path in _ROOT_LIBRARIES if os.path.isdir(path) and not os.path.islink(path)]
    readable = [path for each in (*libraries, *roots, stdlib) for path in _without(each, installed)]
    readable += [executable, *shared, *extra, os.devnull, "/dev/urandom"]
    site = sorted({os.path.dirname(path) for path in extra})
    command = [choom, "-n", "1000", "--", *command] if choom else command
    # The shell outlives a grader that is killed, so the folder is removed in any case.
    command = ["/bin/sh", "-c", '"$@"; exec /bin/rm -rf "$0"', folder, *command]
    hello = {"readable": readable, "listable": [stdlib, *site], "folder": environment["TMPDIR"]}
    hello |= {"site": site, "packages": list(packages)}
    return command, {**options, "env": environment}, folder, hello


def installed_packages(stdlib: str) -> list[str]:
    """Folders of installed packages in what programs can read: the answers of a benchmark could be among them."""
    roots = [pathlib.Path(path) for path in (*_LIBRARIES, stdlib)]
    folders = [*roots, *(folder for root in roots for folder in root.glob("python3*"))]
    found = {folder / name for folder in folders for name in ("site-packages", "dist-packages")}
    return sorted(str(folder) for folder in found if folder.is_dir())


def _without(path: str, hidden: list[str]) -> list[str]:
    """A path; or, if something below it is to be hidden, the entries of the folder without that."""
    if path in hidden or not any(each.startswith(f"{path}/") for each in hidden):
        return [] if path in hidden else [path]
    entries = sorted(entry.path for entry in os.scandir(path) if entry.is_file() or not entry.is_symlink())
    return [found for entry in entries for found in _without(entry, hidden)]


def _bubblewrap(paths: dict[str, str], installed: list[str], folder: str) -> list[str]:
    command = ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    for path, inside in paths.items():  # /usr/local is left out: it may contain data
        command += ["--ro-bind", path, inside]
    # Empty file systems hide the installed packages.
    command += [word for path in installed for word in ("--tmpfs", path, "--remount-ro", path)]
    command += ["--bind", folder, "/tmp"]
    for path in _ROOT_LIBRARIES:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            command += ["--ro-bind", path, path]
    for path in (os.devnull, "/dev/stdin"):  # the second is there to be found; opening it reads descriptor 0
        command += ["--dev-bind", os.devnull, path]
    # There is no /proc: Python does not need it, and a stock pod forbids mounting it.
    return [*command, "--remount-ro", "/", "--chdir", "/", "--"]
