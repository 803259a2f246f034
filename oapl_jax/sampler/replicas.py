"""Data parallelism of the sampler: a mesh as independent replicas, each with an engine and a scheduler of its own.

Replicas share nothing but the weights' values. No program runs on more than one of them, so none ever
waits for another's sequences, and a request's rollouts are the same on whichever replica it runs.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from oapl_jax.rollouts.sampling import Request, Stats
from oapl_jax.sampler.engine import Engine, Params
from oapl_jax.sampler.scheduler import Scheduler, run
from oapl_jax.types import Rollout

Tag = TypeVar("Tag")


def replica_meshes(mesh: Mesh) -> list[Mesh]:
    """One mesh for each index of the axes other than ``tensor``, in their order."""
    devices = np.asarray(mesh.devices).reshape(-1, mesh.shape["tensor"])
    ones = [1] * (len(mesh.axis_names) - 1)
    return [Mesh(row.reshape(*ones, -1), mesh.axis_names) for row in devices]


def replica_params(params: Params, replica: Mesh) -> Params:
    """The part of the weights that lies on one replica's devices, without a copy.

    Args:
        params: on a mesh that has the replica's devices, and split over its axis ``tensor`` only.
        replica: of ``replica_meshes``.
    """
    place = {device: i for i, device in enumerate(np.asarray(replica.devices).flat)}

    def part(leaf: jax.Array) -> jax.Array:
        shards = [shard.data for shard in leaf.addressable_shards if shard.device in place]
        shards.sort(key=lambda data: place[next(iter(data.devices()))])
        spec = leaf.sharding.spec  # pyright: ignore[reportAttributeAccessIssue]
        return jax.make_array_from_single_device_arrays(leaf.shape, NamedSharding(replica, spec), shards)

    return jax.tree.map(part, params)


def free_bytes(mesh: Mesh) -> int:
    """Memory that is free on all devices of a mesh together: what the smallest has, times their number."""
    free = []
    for device in np.asarray(mesh.devices).flat:
        stats = device.memory_stats() if device.platform != "cpu" else None
        free.append(stats["bytes_limit"] - stats["bytes_in_use"] if stats else _host_bytes() // mesh.size)
    return min(free) * mesh.size


@functools.cache
def _host_bytes() -> int:
    """Available memory of this host, once: what is taken of it later is its taker's."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 8 << 30  # not Linux


class Replicas(Generic[Tag]):
    """Several schedulers as one; a request goes to the replica with the fewest unfinished rollouts. For one thread.

    Args:
        engines: one for each replica.
        device_lock: see ``Scheduler``.
        fixed_shapes: see ``Scheduler``.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        device_lock: AbstractContextManager,
        *,
        fixed_shapes: bool = False,
    ):
        self._schedulers: list[Scheduler[Tag]] = [
            Scheduler(engine, device_lock, fixed_shapes=fixed_shapes) for engine in engines
        ]
        self._meshes = [engine.mesh for engine in engines]
        self._whole: Params = None
        self._parts: list[Params] = []

    @property
    def is_idle(self) -> bool:
        """No rollout is in flight or waits."""
        return all(scheduler.is_idle for scheduler in self._schedulers)

    @property
    def num_rows(self) -> int:
        """Rollouts decoded at once."""
        return sum(scheduler.num_rows for scheduler in self._schedulers)

    @property
    def num_unfinished(self) -> int:
        """Rollouts that have not ended."""
        return sum(scheduler.num_unfinished for scheduler in self._schedulers)

    @property
    def wants_more(self) -> bool:
        """A replica could use another request."""
        return any(scheduler.wants_more for scheduler in self._schedulers)

    @property
    def stats(self) -> Stats:
        """Sums over the replicas."""
        parts = [dataclasses.astuple(scheduler.stats) for scheduler in self._schedulers]
        return Stats(*map(sum, zip(*parts, strict=True)))

    @property
    def num_live(self) -> int:
        """Rollouts that are being decoded."""
        return sum(scheduler.num_live for scheduler in self._schedulers)

    def submit(self, request: Request[Tag]) -> None:
        """Puts a request in a queue; see ``Scheduler.submit``."""
        min(self._schedulers, key=lambda scheduler: scheduler.num_unfinished).submit(request)

    def step(self, params: Params) -> list[tuple[Tag, list[Rollout]]]:
        """A step of every replica that has work; returns the groups that they finished."""
        if params is not self._whole:
            self._whole, self._parts = params, self._split(params)
        pairs = zip(self._schedulers, self._parts, strict=True)
        return [group for scheduler, part in pairs if not scheduler.is_idle for group in scheduler.step(part)]

    def run(self, params: Params, requests: Iterable[Request[Tag]]) -> Iterator[tuple[Tag, list[Rollout]]]:
        """Runs all requests, yielding each as it ends; for evaluation and generation."""
        return run(self, params, requests)

    def warm_up(self, params: Params, prompt_lengths: Iterable[int], group_size: int) -> None:
        """Compiles the programs that requests of these sizes need; see ``Scheduler.warm_up``."""
        for scheduler, part in zip(self._schedulers, self._split(params), strict=True):
            scheduler.warm_up(part, prompt_lengths, group_size)

    def abort(self) -> None:
        """Drops all requests."""
        for scheduler in self._schedulers:
            scheduler.abort()

    def _split(self, params: Params) -> list[Params]:
        everywhere = {device for leaf in jax.tree.leaves(params)[:1] for device in leaf.sharding.device_set}
        if len(self._meshes) == 1 and everywhere <= set(np.asarray(self._meshes[0].devices).flat):
            return [params]
        return [replica_params(params, mesh) for mesh in self._meshes]
