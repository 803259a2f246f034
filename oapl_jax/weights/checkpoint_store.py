"""Checkpoints in an object store: the files of a folder, and a marker that is written last.

    checkpoints/100/...     the files that Orbax wrote on the disks of the processes that train
    checkpoints/100.json    the size of each; without this marker there is no checkpoint of step 100

Orbax does not write them there itself. It takes an ``s3://`` address for a local path; ``gs://`` it writes through two
libraries, of which one is TensorFlow's where that is installed, each with its own login and its own retries.
"""

import contextlib
import json
import pathlib
import re
import tempfile
from collections.abc import Iterator

from oapl_jax.distributed.team import Team
from oapl_jax.io import storage
from oapl_jax.io.storage import SharedPath

MARKER = re.compile(r"(0|[1-9][0-9]*)\.json")


class CheckpointStore:
    """The folder ``checkpoints`` of a run; one team writes it, and its leader alone removes and renames."""

    def __init__(self, directory: SharedPath):
        self._directory = directory

    def steps(self) -> list[int]:
        """Steps of whole checkpoints, ascending."""
        matches = map(MARKER.fullmatch, storage.names(self._directory))
        return sorted(int(match[1]) for match in matches if match)

    def put(self, step: int, folder: pathlib.Path, writers: Team) -> None:
        """Copies a checkpoint of which each writer has a part in ``folder``; all of them call this, and leave it together.

        A file that several have, such as the description of the arrays, is copied by the first of them. What a killed
        process has left of this step is replaced.

        Raises:
            OSError: it cannot be written.
            PeerError, TimeoutError: as ``Team.gather``; there is no checkpoint of this step.
        """
        if writers.is_leader:
            self.remove(step)
        parts = writers.gather({name: (folder / name).stat().st_size for name in storage.files_in(folder)})
        of_others = {name for part in parts[: writers.rank] for name in part}
        storage.put_folder(folder, self._folder(step), parts[writers.rank].keys() - of_others)
        writers.wait()
        if writers.is_leader:
            sizes = {name: size for part in reversed(parts) for name, size in part.items()}
            storage.replace(self._marker(step), json.dumps({"files": sizes}).encode() + b"\n")
        writers.wait()

    def fetch(self, step: int, folder: pathlib.Path) -> None:
        """Copies a checkpoint to this disk.

        Raises:
            ValueError: it is not what its marker says.
            OSError: it cannot be read.
        """
        sizes = storage.read_object(self._marker(step))["files"]
        storage.get_folder(self._folder(step), sizes, folder)
        for name, size in sizes.items():
            if (found := (folder / name).stat().st_size) != size:
                raise ValueError(f"{self._folder(step) / name} has {found:,} bytes, its marker says {size:,}")

    def remove(self, step: int) -> None:
        """The marker first: what is half removed is not there."""
        storage.remove(self._marker(step))
        storage.remove(self._folder(step))

    def set_aside(self, step: int) -> str:
        """Makes it no checkpoint by another name of its marker, which it returns; its files stay until the step is saved again."""
        return str(storage.move_aside(self._marker(step)))

    def _folder(self, step: int) -> SharedPath:
        return self._directory / str(step)

    def _marker(self, step: int) -> SharedPath:
        return self._directory / f"{step}.json"


@contextlib.contextmanager
def checkpoint_folder(directory: SharedPath, step: int) -> Iterator[pathlib.Path]:
    """The folder of a checkpoint, of which there is a copy here while it is needed if ``directory`` is in a store."""
    if storage.is_local(directory):
        yield pathlib.Path(str(directory / str(step))).absolute()
        return
    with tempfile.TemporaryDirectory(prefix="oapl-checkpoint-") as scratch:
        folder = pathlib.Path(scratch) / str(step)
        CheckpointStore(directory).fetch(step, folder)
        yield folder
