"""An object store whose listings are late: what was created, not what is listed, has to decide."""

import contextlib
import pathlib
import threading
import time
from typing import ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class LateListings(MemoryFileSystem):
    """fsspec's store in memory; a folder is listed as it was ``lag`` seconds ago, a file is always as it is now."""

    protocol = "gs"
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]
    lag: ClassVar = 1.0
    changes: ClassVar[dict[str, list[tuple[float, bool]]]] = {}
    lock: ClassVar = threading.RLock()

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").strip("/")

    @contextlib.contextmanager
    def changing(self, path):
        with self.lock:
            yield
            path = self._strip_protocol(path)
            self.changes.setdefault(path, []).append((time.monotonic(), path in self.store))

    def makedirs(self, path, exist_ok=False):
        """Nothing: an object store has no folders."""

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        with self.changing(path):
            super().pipe_file(path, value, mode=mode)

    def put_file(self, lpath, rpath, **kwargs):
        self.pipe_file(rpath, pathlib.Path(lpath).read_bytes())  # whole, as in an object store

    def get_file(self, rpath, lpath, **kwargs):
        pathlib.Path(lpath).write_bytes(self.cat_file(rpath))

    def cat_file(self, path, **kwargs):
        """Not through ``open``, whose readers share one position."""
        try:
            return self.store[self._strip_protocol(path)].getvalue()
        except KeyError:
            raise FileNotFoundError(path) from None

    def cp_file(self, path1, path2, **kwargs):
        with self.changing(path2):
            super().cp_file(path1, path2)

    def rm_file(self, path):
        with self.changing(path):
            super().rm_file(path)

    def rm(self, path, recursive=False, maxdepth=None):
        """As S3 does it: what is listed is deleted, and it is no error that it is gone already."""
        path = self._strip_protocol(path)
        for name in [path] if path in self.store else self.find(path):
            with contextlib.suppress(FileNotFoundError):
                self.rm_file(name)

    def find(self, path, **kwargs):
        prefix, then = self._strip_protocol(path) + "/", time.monotonic() - self.lag
        with self.lock:
            past = {name: [there for at, there in changes if at <= then] for name, changes in self.changes.items()}
        return sorted(name for name, there in past.items() if name.startswith(prefix) and there and there[-1])

    def ls(self, path, detail=True, **kwargs):
        prefix = self._strip_protocol(path) + "/"
        names = sorted({prefix + name.removeprefix(prefix).partition("/")[0] for name in self.find(path)})
        if not names:
            raise FileNotFoundError(path)
        return [{"name": name, "size": 0, "type": "file"} for name in names] if detail else names


def make_place():
    """A new address in such a store, which from now on stands for Google's."""
    fsspec.register_implementation("gs", LateListings, clobber=True)
    return f"gs://runs/{time.monotonic_ns()}"
