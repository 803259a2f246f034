"""Files that several processes share: in a folder of a file system, or in an object store (``gs://``, ``s3://``).

An object store has no rename and no append; what both have, and all that is used here: a file appears whole
or not at all (``replace``), and a file can be created by one of those who try (``create``). Object stores
are reached through fsspec, which needs the store's own package: the extras ``gcs`` and ``s3``.
"""

import contextlib
import errno
import itertools
import os
import pathlib
import re
import shutil
import stat
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import fsspec
from etils import epath

from oapl_jax.untrusted import reading

SharedPath = pathlib.Path | epath.Path
"""A path in either: ``shared_path`` makes one."""

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""A disk that is full, over a quota, read-only or failing."""

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""What a file system without hard links (Cloud Storage FUSE, some network disks) answers."""

VERSION = re.compile("[0-9]{6}|[1-9][0-9]{6,8}")
"""A policy version as the name of a folder."""
MESSAGE_BYTES = 2**22
"""Most bytes of a file by which processes inform each other."""

SHORTEST_POLL, USUAL_POLL, LONGEST_POLL = 0.01, 0.3, 1.0
"""Seconds between two polls: at least; at most where a poll is cheap; at most where it is not."""


def shared_path(address: str | pathlib.Path | epath.Path) -> SharedPath:
    """``pathlib`` for a local path, ``epath`` for an address with ``://``."""
    return epath.Path(str(address)) if "://" in str(address) else pathlib.Path(str(address))


def next_poll(cost: float, waited: float) -> float:
    """Seconds until the next poll for what another process writes.

    ``cost`` seconds are what a poll takes, which is at most a fifth of the time; ``waited`` seconds since something was
    found, the next thing is seen at most a fiftieth of that too late.
    """
    return min(LONGEST_POLL, max(4 * cost, min(USUAL_POLL, max(SHORTEST_POLL, waited / 50))))


def create(path: SharedPath, content: bytes, *, is_durable: bool = True) -> bool:
    """Writes a file that is not there yet, whole; False, and nothing changed, where it is there.

    Of several processes that try, at most one gets True. It may get False for its own file, where an object store has
    written it and the answer was lost. Where it is durable it survives a crash of the machine when this returns; what
    only shows that a process is alive need not be.

    Raises:
        OSError: full disk, no permission, no network.
    """
    if (store := _store(path)) is not None:
        with contextlib.suppress(FileExistsError), _raising_os_errors(path):
            store.pipe_file(str(path), content, mode="create")
            return True
        return False
    local = pathlib.Path(str(path))
    local.parent.mkdir(parents=True, exist_ok=True)
    temporary = _write_beside(local, content, is_durable)
    try:
        try:
            os.link(temporary, local)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            with local.open("xb") as file:
                _write(file, content, is_durable)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    if is_durable:
        sync_folder(local.parent)
    return True


def replace(path: SharedPath, content: bytes, *, is_durable: bool = True) -> None:
    """Writes a file: readers see the old content or the new one. Durability and errors as in ``create``."""
    if (store := _store(path)) is not None:
        with _raising_os_errors(path):
            store.pipe_file(str(path), content)
        return
    local = pathlib.Path(str(path))
    local.parent.mkdir(parents=True, exist_ok=True)
    temporary = _write_beside(local, content, is_durable)
    if local.is_dir() and not local.is_symlink():  # which others have put there
        move_aside(local)
    temporary.replace(local)
    if is_durable:
        sync_folder(local.parent)


def read(path: SharedPath, most_bytes: int | None = None) -> bytes:
    """The content of a file that another process may have written.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no regular file (links are not followed), or has more than ``most_bytes``; names it.
        OSError: it cannot be read.
    """
    if (store := _store(path)) is None:
        content = _read_local(path, most_bytes)
    else:
        with _raising_os_errors(path):
            content = store.cat_file(str(path), end=None if most_bytes is None else most_bytes + 1)
    if most_bytes is not None and len(content) > most_bytes:
        raise ValueError(f"{path}: has more than {most_bytes:,} bytes")
    return content


def _read_local(path: SharedPath, most_bytes: int | None) -> bytes:
    def open_at_once(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would block

    try:
        with open(str(path), "rb", opener=open_at_once) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read(-1 if most_bytes is None else most_bytes + 1)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
    raise ValueError(f"{path}: is not a regular file")


def read_object(path: SharedPath) -> dict[str, Any]:
    """The JSON object in a small file that another process has written.

    Raises:
        FileNotFoundError: there is none.
        ValueError: as ``read``; or it is no JSON object; names it.
        OSError: it cannot be read.
    """
    return reading.parse_object(read(path, MESSAGE_BYTES), path)


def exists(path: SharedPath) -> bool:
    """Whether there is something of this name; in an object store, such a file."""
    if (store := _store(path)) is None:
        return os.path.lexists(str(path))
    with _raising_os_errors(path):
        return store.isfile(str(path))


def names(folder: SharedPath) -> list[str]:
    """What lies in a folder, sorted; nothing where there is no such folder, or a file in its place."""
    store = _store(folder)
    try:
        if store is None:
            return sorted(entry.name for entry in pathlib.Path(str(folder)).iterdir())
        with _raising_os_errors(folder):
            return sorted({name.rstrip("/").rpartition("/")[2] for name in store.ls(str(folder), detail=False)})
    except (FileNotFoundError, NotADirectoryError):
        return []


def numbers(folder: SharedPath) -> list[int]:
    """The versions that have a folder in this one, ascending: names of six digits or a few more."""
    return sorted(int(name) for name in names(folder) if VERSION.fullmatch(name))


def remove(path: SharedPath) -> None:
    """Removes a file, or a folder with what is in it; nothing where there is none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if (store := _store(path)) is not None:
            with _raising_os_errors(path):
                store.rm(str(path), recursive=True)
        elif (local := pathlib.Path(str(path))).is_dir() and not local.is_symlink():
            shutil.rmtree(local, ignore_errors=True)
        else:
            local.unlink()


def move_aside(path: SharedPath) -> SharedPath:
    """Renames a file, or a local folder, to ``NAME.damaged``, so that nothing reads it again; returns the new path."""
    aside, times = path.with_name(f"{path.name}.damaged"), itertools.count(2)
    while exists(aside):
        aside = path.with_name(f"{path.name}.damaged-{next(times)}")
    if (store := _store(path)) is not None:
        with _raising_os_errors(path):
            store.copy(str(path), str(aside))
            store.rm_file(str(path))
    else:
        pathlib.Path(str(path)).rename(pathlib.Path(str(aside)))
    return aside


@contextlib.contextmanager
def folder_for(target: SharedPath, last: str | None = None) -> Iterator[pathlib.Path]:
    """Where the files of a new folder are to be written: in its place, or on this disk and put to the store at the end.

    In a store the file ``last`` comes after all others: where it is, the folder is whole.
    """
    with local_folder(target) as folder:
        yield folder
        if not is_local(target):
            put_folder(folder, target, [name for name in files_in(folder) if name != last])
            if last is not None:
                put_folder(folder, target, [last])


@contextlib.contextmanager
def local_folder(folder: SharedPath) -> Iterator[pathlib.Path]:
    """The folder itself, or one of its name on this disk, not made yet, that is deleted at the end."""
    if is_local(folder):
        yield pathlib.Path(str(folder))
        return
    with tempfile.TemporaryDirectory(prefix="oapl-") as scratch:
        yield pathlib.Path(scratch) / folder.name


def files_in(folder: pathlib.Path) -> list[str]:
    """The names of the files in a local folder and in the folders in it, relative and sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def put_folder(local: pathlib.Path, target: SharedPath, file_names: Iterable[str] | None = None) -> None:
    """Copies files of a local folder, by default all, to an object store, several at a time and each in pieces."""
    found = files_in(local) if file_names is None else list(file_names)
    with _raising_os_errors(target):
        _store(target).put([str(local / name) for name in found], [str(target / name) for name in found])


def get_folder(source: SharedPath, file_names: Iterable[str], target: pathlib.Path) -> pathlib.Path:
    """The folder itself where it is local, else a copy of the files in ``target``."""
    if (store := _store(source)) is None:
        return pathlib.Path(str(source))
    found = list(file_names)
    for name in found:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
    with _raising_os_errors(source):
        store.get([str(source / name) for name in found], [str(target / name) for name in found])
    return target


def check_creates_once(folder: SharedPath) -> None:
    """Refuses an object store in which a file can be created twice: leases and the rollout log rely on that.

    Raises:
        ValueError: it has no such precondition, or cannot be written.
    """
    if is_local(folder):
        return
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        create(probe, b"1")
        is_created_twice = create(probe, b"2")
        is_kept = read(probe) == b"1"
        remove(probe)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written and read: {error}") from error
    if is_created_twice or not is_kept:
        raise ValueError(
            f"{folder}: this store creates a file that is there already (it ignores ifGenerationMatch or If-None-Match),"
            " so two processes could do the same work; use another store, or mount one"
        )


def sync_folder(folder: pathlib.Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_local(path: SharedPath) -> bool:
    """Whether it is in a file system."""
    return "://" not in str(path)


_lock = threading.Lock()


def _store(path: SharedPath) -> Any:
    """The object store of an address; None for a local path."""
    if is_local(path):
        return None
    protocol = str(path).partition("://")[0]
    with _lock:  # fsspec keeps one instance for each protocol; listings would hide what others write
        try:
            return fsspec.filesystem(protocol, use_listings_cache=False)
        except ImportError as error:
            raise ValueError(
                f"{path}: {error}; pip install 'oapl-jax[gcs]' for gs://, 'oapl-jax[s3]' for s3://"
            ) from error


@contextlib.contextmanager
def _raising_os_errors(path: SharedPath) -> Iterator[None]:
    """Each store's library has exceptions of its own for what callers know as OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{path}: {type(error).__name__}: {error}") from error


def _write_beside(path: pathlib.Path, content: bytes, is_durable: bool) -> pathlib.Path:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            _write(file, content, is_durable)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _write(file: Any, content: bytes, is_durable: bool) -> None:
    file.write(content)
    file.flush()
    if is_durable:
        os.fsync(file.fileno())
