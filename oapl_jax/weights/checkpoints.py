"""Checkpoints of a run: saved in the background, verified when loaded, with a fall-back to the one before."""

import contextlib
import hashlib
import logging
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array, UInt32

from oapl_jax.distributed.memory import trim_heap
from oapl_jax.distributed.messages import PeerError
from oapl_jax.distributed.team import Team
from oapl_jax.io import storage
from oapl_jax.io.storage import SharedPath
from oapl_jax.types import RunError
from oapl_jax.weights.checkpoint_store import CheckpointStore

Tree = TypeVar("Tree")
Meta = dict[str, Any]

PEER_SECONDS = 1800.0
"""For how long another process may take to load a checkpoint."""

GOLDEN_RATIO = 0x9E3779B9
"""2^32 divided by it, odd: spreads positions over all bits."""


_NO_NEWS = ("Skipping merge of OCDBT", "Waiting for previous save", "Global object size logging disabled")
"""Warnings of Orbax about what is done here on purpose."""
logging.getLogger("absl").addFilter(lambda record: not any(text in record.getMessage() for text in _NO_NEWS))


class LayoutError(ValueError):
    """A checkpoint is sound, but not of this model."""


class Checkpoints:
    """``checkpoints/STEP`` under a run directory: the newest ``keep``, ``best_step``, and steps that ``keep_every`` divides.

    Orbax commits a checkpoint by a rename when it is whole, so a killed run leaves none half-written.
    It does not notice bits that changed on disk later: a fingerprint of the arrays, computed on their
    devices, is saved with them and compared when they are loaded. (Orbax's newer interface, ``v1``, cannot save
    where only some processes of a job have the arrays; it reads what is saved here.)

    Where the run directory is in an object store, Orbax saves to a folder of temporary files, in each process what this
    process has of the arrays, and a thread copies each checkpoint to the store (``checkpoint_store.py``). A killed run
    goes on with the newest one that was copied whole.

    ``team``: the processes that have the arrays, all of which make the same calls; None: this one alone.
    """

    def __init__(self, directory: SharedPath, keep: int, keep_every: Sequence[int] = (), team: Team | None = None):
        self._place = directory
        self._keep, self._keep_every = keep, keep_every
        self._team = team or Team.alone()
        self._copiers = Team(f"{self._team.name}/copies", self._team.members)
        """The same processes: the threads that copy exchange messages of their own."""
        self.best_step: float | None = None
        """Of a checkpoint that is kept too."""
        self._store: CheckpointStore | None = None
        self._stored: list[int] = []
        """Steps of the checkpoints in the store, ascending."""
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._copying = ThreadPoolExecutor(1, "checkpoints")
        self._copied: Future[None] | None = None
        if storage.is_local(directory):
            self._directory = pathlib.Path(str(directory)).absolute()
        else:
            self._store = CheckpointStore(directory)
            self._stored = self._team.agree(self._store.steps, PEER_SECONDS)  # listings may differ
            self._scratch = tempfile.TemporaryDirectory(prefix="oapl-checkpoints-")
            self._directory = pathlib.Path(self._scratch.name)
        self._manager = self._open()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint that is being or was saved."""
        return max((*self._stored, *self._manager.all_steps()), default=None)

    def save(self, step: int, tree: Any, meta: Meta) -> None:
        """Copies the arrays to host memory and writes them in the background.

        The caller may donate or change the arrays when this returns. An error of the save before is raised here.

        Raises:
            RunError: full disk, no permission; the checkpoints before are as they were.
        """
        arrays = flatten(tree)
        meta = {**meta, "layout": _layout(arrays), "fingerprint": fingerprint(list(arrays.values()))}
        saved = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
        with self._explain():
            self._wait_for_copy()
            self._manager.save(step, args=saved)
            if jax.default_backend() == "cpu":
                # Here a host "copy" is a view of the very buffer that the next train step donates.
                self._manager.wait_until_finished()
                trim_heap()  # of compressed chunks, before new weights of a sampler are there too
            if self._store is not None:
                self._copied = self._copying.submit(self._copy, self._store, step, self.best_step)

    def wait(self) -> None:
        """Returns when the last save is on disk, or in the store."""
        with self._explain():
            self._manager.wait_until_finished()
            self._wait_for_copy()

    def _wait_for_copy(self) -> None:
        copied, self._copied = self._copied, None
        if copied is not None:
            copied.result()

    def _copy(self, store: CheckpointStore, step: int, best_step: float | None) -> None:
        """Copies a checkpoint to the store, when Orbax has written it, and removes those that are not kept."""
        self._manager.wait_until_finished()
        store.put(step, self._directory / str(step), self._copiers)
        self._stored = sorted({*self._stored, step})
        newest = self._stored[-self._keep :]
        for old in list(self._stored):
            if old not in (*newest, best_step) and not any(every and old % every == 0 for every in self._keep_every):
                self._stored.remove(old)
                if self._team.is_leader:
                    store.remove(old)

    def restore(self, abstract_tree: Tree, note: Callable[[str], None]) -> tuple[int, Tree, Meta] | None:
        """Loads the newest checkpoint that can be loaded, as ``abstract_tree`` has it; None where there is none.

        A damaged one is renamed to ``STEP.damaged``, said through ``note``, and the one before is tried.

        Raises:
            LayoutError: a checkpoint is of another model or optimizer.
            RuntimeError: there are checkpoints and none can be loaded.
        """
        steps = sorted(self._manager.all_steps() if self._store is None else self._stored, reverse=True)
        for step in steps:
            loaded, problem = None, None
            try:
                loaded = self._load(step, flatten(abstract_tree))
            except LayoutError:
                raise
            except Exception as error:
                problem = _first_line(error)
            problem = next(filter(None, self._team.gather(problem)), None)
            if loaded is not None and problem is None:  # in all processes, which compute the fingerprint together
                arrays, meta = loaded
                found = fingerprint(arrays)
                if found == meta["fingerprint"]:
                    return step, jax.tree.unflatten(jax.tree.structure(abstract_tree), arrays), meta
                problem = f"fingerprint {found:#010x} of the arrays is not the saved {meta['fingerprint']:#010x}"
            damaged = self._set_aside(step)
            note(f"checkpoint {step} cannot be loaded ({problem}); moved to {damaged}, trying the one before")
        if steps:
            raise RuntimeError(
                f"none of the checkpoints {steps} in {self._place} can be loaded; see the messages above"
            )
        return None

    def close(self) -> None:
        """Waits for the last save and ends the background threads."""
        with contextlib.ExitStack() as stack, self._explain():
            if self._scratch is not None:
                stack.callback(self._scratch.cleanup)
            stack.callback(self._copying.shutdown)
            self._manager.close()
            self._wait_for_copy()

    @contextlib.contextmanager
    def _explain(self) -> Iterator[None]:
        """Orbax raises whatever its storage does, from this save or from the one before."""
        try:
            yield
        except PeerError:
            raise
        except Exception as error:
            raise RunError(f"a checkpoint cannot be written to {self._place}: {_first_line(error)}") from error

    def _load(self, step: int, abstract: dict[str, Any]) -> tuple[list[Array], Meta]:
        if self._store is not None:
            self._store.fetch(step, self._directory / str(step))
            self._manager.reload()
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if meta["layout"] != _layout(abstract):
            raise LayoutError(
                f"checkpoint {step} in {self._place} has arrays of other names, shapes or types than this config's"
                " model and optimizer; choose another run.dir for another model"
            )
        wanted = ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract))
        arrays = self._manager.restore(step, args=wanted)["arrays"]
        return [arrays[name] for name in abstract], meta

    def _set_aside(self, step: int) -> str:
        self._manager.close()
        if self._store is None:
            folder = self._directory / str(step)
            target = self._team.agree(lambda: str(storage.move_aside(folder)), PEER_SECONDS)
        else:
            store = self._store
            shutil.rmtree(self._directory / str(step), ignore_errors=True)
            self._stored.remove(step)
            target = self._team.agree(lambda: store.set_aside(step), PEER_SECONDS)
        self._manager = self._open()
        return target

    def _open(self) -> ocp.CheckpointManager:
        managers: Any = ocp.checkpoint_managers  # Orbax's policies do not satisfy Orbax's protocols for a type checker
        every = [managers.EveryNSteps(steps) for steps in self._keep_every if steps]
        kept = [managers.LatestN(self._keep), _Best(self), *every]
        if self._store is not None:  # this disk has the newest one only
            kept = [managers.LatestN(1)]
        writers, primary = self._team, self._team.members[0]
        if self._store is not None:  # each process writes whole folders of its own, as far as Orbax knows
            writers, primary = Team.alone(), None
        processes = ocp.options.MultiprocessingOptions(
            primary, set(writers.members), barrier_sync_key_prefix=writers.name
        )
        if writers.is_leader:
            self._directory.mkdir(parents=True, exist_ok=True)
        writers.wait()
        # The default policies decide by themselves what to save and keep everything.
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=managers.FixedIntervalPolicy(1),
            preservation_policy=managers.AnyPreservationPolicy(kept),
            create=False,
            multiprocessing_options=processes,
            # Folders that a thread makes are announced under keys that all processes of a job share.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        # OCDBT, the default, gathers what it has compressed in memory until it has 2 GB of a file.
        arrays = ocp.StandardCheckpointHandler(use_ocdbt=False, multiprocessing_options=processes)
        meta = ocp.JsonCheckpointHandler(multiprocessing_options=processes)
        return ocp.CheckpointManager(self._directory, options=options, item_handlers={"arrays": arrays, "meta": meta})


class _Best:
    """Keeps ``Checkpoints.best_step``: a preservation policy of Orbax."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [checkpoint.step == self._checkpoints.best_step for checkpoint in checkpoints]


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by the name of their path, in the order of ``jax.tree.leaves``."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


def fingerprint(leaves: Iterable[Array]) -> int:
    """32-bit checksum of the bits of arrays: any changed element changes it; independent of sharding.

    Each array is summed up on its own devices: the learner's and the sampler's may be different ones.
    """
    total = 0
    for leaf in leaves:
        # One after the other: on CPU, many programs with collectives in flight starve each other of threads.
        total = (31 * total + int(jax.block_until_ready(_checksum(leaf)))) % 2**32
    return total


def _layout(arrays: dict[str, Any]) -> str:
    described = [(name, tuple(array.shape), str(array.dtype)) for name, array in arrays.items()]
    return hashlib.sha256(repr(described).encode()).hexdigest()[:16]


@jax.jit
def _checksum(leaf: Array) -> UInt32[Array, ""]:
    """Elements are mixed with their position before the sum.

    A product with it would not do: floats often differ in high bits only, and 1.0 and 2.0 exchanged at a
    distance of 256 would go unnoticed.
    """
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
    position, stride = jnp.uint32(0), 1
    for axis in reversed(range(leaf.ndim)):
        position = position + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= leaf.shape[axis]
    return jnp.sum(_mix(bits + position * jnp.uint32(GOLDEN_RATIO)), dtype=jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """MurmurHash3's last stage: one to one, and every bit of the input changes half of the output's."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:300]
