"""The process's sampler: replicas of the policy, their caches, and the lock of the devices.

The axes of the sampler's mesh other than ``tensor`` are replicas, each with an engine and a scheduler. No program runs
on more than one of them, and a request's rollouts are the same on whichever replica it runs.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from oapl_jax.model.qwen import QwenConfig
from oapl_jax.rollouts.sampling import Request, Stats
from oapl_jax.sampler.engine import Engine, Params, is_large_on_cpu
from oapl_jax.sampler.scheduler import Scheduler
from oapl_jax.types import Rollout


def replica_meshes(mesh: Mesh) -> list[Mesh]:
    """One mesh for each index of the axes other than ``tensor``, in their order."""
    devices = np.asarray(mesh.devices).reshape(-1, mesh.shape["tensor"])
    ones = [1] * (len(mesh.axis_names) - 1)
    return [Mesh(row.reshape(*ones, -1), mesh.axis_names) for row in devices]


def replica_params(params: Params, replica: Mesh) -> Params:
    """The weights on the devices of one of ``replica_meshes``, without a copy; they are split over ``tensor`` only."""
    order = {device: i for i, device in enumerate(np.asarray(replica.devices).flat)}

    def part(leaf: jax.Array) -> jax.Array:
        shards = [shard.data for shard in leaf.addressable_shards if shard.device in order]
        shards.sort(key=lambda data: order[next(iter(data.devices()))])
        spec = leaf.sharding.spec  # pyright: ignore[reportAttributeAccessIssue]
        return jax.make_array_from_single_device_arrays(leaf.shape, NamedSharding(replica, spec), shards)

    return jax.tree.map(part, params)


def programs_take_turns(model: QwenConfig, mesh: Mesh) -> bool:
    """Whether the programs of trainer and sampler on a mesh that they share run one at a time, by a lock.

    On several devices they must: see ``Scheduler``. With a large model on a CPU they would only get in each other's way,
    and the temporaries of both would lie in memory.
    """
    return mesh.size > 1 or is_large_on_cpu(model, mesh)


class JaxSampler:
    """Our ``Sampler``: a request goes to the replica with the fewest unfinished rollouts.

    Args:
        engines: one for each replica that this process has.
        mesh: the whole sampler's, those of other processes included.
        decode: token ids to text, for stop strings.
    """

    def __init__(self, engines: Sequence[Engine], mesh: Mesh, decode: Callable[[list[int]], str] | None = None):
        self._engines, self._decode = engines, decode
        takes_turns = any(programs_take_turns(engine.model_config, mesh) for engine in engines)
        self.device_lock: AbstractContextManager = threading.RLock() if takes_turns else contextlib.nullcontext()
        """Held while a program is enqueued on the mesh, where ``programs_take_turns``."""
        self._schedulers: list[Scheduler] = []
        """With the caches; made when weights are set, dropped by ``release``."""
        self._parts: list[Params] = []
        """The weights, by replica."""
        self._released = Stats()
        self.say: Callable[[str], None] = lambda message: None
        """Told which program is being compiled."""

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or is in flight."""
        return all(scheduler.is_idle for scheduler in self._schedulers)

    @property
    def wants_more(self) -> bool:
        """Whether a replica could use another request."""
        return any(scheduler.wants_more for scheduler in self._schedulers)

    @property
    def num_live(self) -> int:
        """Number of rollouts that are being decoded."""
        return sum(scheduler.num_live for scheduler in self._schedulers)

    @property
    def stats(self) -> Stats:
        """Sums over the replicas since the start."""
        parts = [self._released, *(scheduler.stats for scheduler in self._schedulers)]
        return Stats(*map(sum, zip(*map(dataclasses.astuple, parts), strict=True)))

    def set_weights(self, weights: Params) -> None:
        """Uses these parameters, which lie on the sampler's mesh."""
        if not self._schedulers:
            self._schedulers = [Scheduler(engine, self.device_lock, decode=self._decode) for engine in self._engines]
        self._parts = self._split(weights)

    def submit(self, request: Request) -> None:
        """Queues a request; see ``Scheduler.submit``."""
        min(self._schedulers, key=lambda scheduler: scheduler.num_unfinished).submit(request)

    def step(self) -> list[tuple[Any, list[Rollout]]]:
        """A step of every replica that has work; returns the groups that they finished."""
        pairs = zip(self._schedulers, self._parts, strict=True)
        return [group for scheduler, part in pairs if not scheduler.is_idle for group in scheduler.step(part)]

    def abort(self) -> None:
        """Drops all requests."""
        for scheduler in self._schedulers:
            scheduler.abort()

    def warm_up(self, prompt_lengths: Iterable[int], group_size: int) -> None:
        """Compiles the programs that requests of these sizes need; see ``Scheduler.warm_up``."""
        for scheduler, part in zip(self._schedulers, self._parts, strict=True):
            scheduler.warm_up(part, prompt_lengths, group_size, self.say)

    def release(self) -> None:
        """Frees weights and caches until weights are set again."""
        self._released, self._schedulers, self._parts = self.stats, [], []

    def _split(self, params: Any) -> list[Params]:
        everywhere = {device for leaf in jax.tree.leaves(params)[:1] for device in leaf.sharding.device_set}
        meshes = [engine.mesh for engine in self._engines]
        if len(meshes) == 1 and everywhere <= set(np.asarray(meshes[0].devices).flat):
            return [params]
        return [replica_params(params, mesh) for mesh in meshes]
