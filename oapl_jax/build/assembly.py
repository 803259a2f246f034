"""What the config of a training run means, from shapes, vocabulary size and stop ids alone.

A run puts arrays into it, preflight compiles it for devices that are only described, ``--dry-run`` prints its account.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from oapl_jax.build.account import Account, disk, learner_bytes
from oapl_jax.build.checks import objective_of
from oapl_jax.build.learner import Learner, make_learner
from oapl_jax.build.sampler import PAGE_SIZE, NoRoomError, cache_bytes, make_engines, num_prepared
from oapl_jax.config.commands import TrainConfig
from oapl_jax.distributed.memory import usable_bytes
from oapl_jax.distributed.sharding import (
    SAMPLER_RULES,
    TRAINER_RULES,
    check_processes,
    device_bytes,
    make_meshes,
    processes_of,
    shardings,
)
from oapl_jax.distributed.team import Team
from oapl_jax.distributed.transfer import Transfer
from oapl_jax.model import qwen
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.sampler.engine import Engine
from oapl_jax.sampler.sampler import replica_meshes
from oapl_jax.weights.sync import WeightSync


@dataclasses.dataclass(frozen=True)
class Assembly:
    """Everything of a run that is no array and no file; made by ``make_assembly``."""

    config: TrainConfig
    architecture: qwen.QwenConfig
    trainer_mesh: Mesh
    sampler_mesh: Mesh
    """The same object as ``trainer_mesh`` where they share their devices."""
    learner: Learner
    sync: WeightSync
    """Makes the sampler's copy: on its mesh, or on the trainer's where ``transfer`` takes it from there."""
    engines: tuple[Engine, ...]
    """One for each replica of the sampler in this process; none where not a single rollout fits."""
    account: Account
    trainers: Team
    samplers: Team

    @property
    def is_colocated(self) -> bool:
        """Whether trainer and sampler share their devices."""
        return self.trainer_mesh is self.sampler_mesh

    @functools.cached_property
    def transfer(self) -> Transfer | None:
        """Takes the weights to the samplers' processes; None where every process that trains samples too."""
        if self.trainers.members == self.samplers.members:
            return None
        everyone = Team("transfer", [*self.trainers.members, *self.samplers.members])
        target = shardings(self.sampler_shapes, self.sampler_mesh, SAMPLER_RULES)
        chunk_bytes = self.config.window.sync_chunk_mib * 2**20
        return Transfer(self.sampler_shapes, target, chunk_bytes, everyone.wait)

    @property
    def sampler_shapes(self) -> Any:
        """Shapes of the sampler's weights, with the shardings that ``sync`` gives them."""
        return self.sync.abstract(self.learner.shapes.params)

    @property
    def replica_shapes(self) -> Any:
        """Shapes of the weights of an engine of this process, with their shardings."""
        params = self.learner.shapes.params
        return WeightSync(params, self.engines[0].mesh, self.config.sampler.dtype).abstract(params)

    @property
    def num_replicas(self) -> int:
        """Replicas of the sampler, over all processes."""
        return self.sampler_mesh.size // self.sampler_mesh.shape["tensor"]

    def describe(self) -> dict[str, str]:
        """The plan of the run, line by line: sizes, meshes, tokens and bytes."""
        config, rows = self.config, self.learner.rows
        windows, sampler = -(-config.run.steps // config.window.sync_every), config.sampler
        groups = config.learner.batch_rollouts // sampler.group_size
        lines = {
            "model": f"{self.architecture.model_type}, {self.architecture.num_params:,} parameters,"
            f" {self.learner.vocab_size:,} of {self.architecture.vocab_size:,} vocabulary rows in use",
            "trainer mesh": _describe_mesh(self.trainer_mesh),
            "sampler mesh": "the trainer's" if self.is_colocated else _describe_mesh(self.sampler_mesh),
            "run": f"{config.run.steps:,} steps in {windows:,} windows of {config.window.sync_every}"
            if config.offline is None
            else f"at most {config.run.steps:,} steps in {len(config.offline.rounds)} rounds of finished data",
            "batch": f"{config.learner.batch_rollouts} rollouts = {groups} prompts x G={sampler.group_size},"
            f" at most {config.learner.batch_rollouts * rows.max_tokens:,} tokens a step"
            + (f" of {updates} updates" if (updates := config.learner.updates_per_batch) > 1 else ""),
            "rows": "decoded by other processes of the job"
            if not self.engines
            else f"{len(self.engines)} x {self.engines[0].num_rows}, {self.engines[0].num_pages:,} pages of {PAGE_SIZE}"
            " tokens of KV cache each",
        }
        lines |= {f"{name} bytes": text for name, text in self.account.describe().items()}
        return lines | {
            "disk": disk(config, self.learner.shapes.stored, self.sampler_shapes, self.learner.shapes.params)
        }


def make_assembly(
    config: TrainConfig,
    architecture: qwen.QwenConfig,
    vocab_size: int,
    stop_ids: Sequence[int],
    *,
    devices: Sequence[Any] | None = None,
    usable: float | None = None,
    replica_devices: Callable[[int], Sequence[Any] | None] = lambda num_devices: None,
    may_lack_room: bool = False,
) -> Assembly:
    """Makes what the config names.

    ``vocab_size`` is the tokenizer's length. ``devices`` are real ones or described ones (None: all of the job), with
    ``usable`` bytes of memory each (None: ask the devices). ``replica_devices`` gives devices to compile the sampler's
    programs for, by their number, where the first of ``devices`` do not serve: libtpu takes a part of a described slice
    only where its ids are the first ones. Where no rollout fits and that is allowed (``may_lack_room``), the assembly has
    no engines.

    Raises:
        NoRoomError: the memory has no room for one rollout.
        ValueError: what the config got wrong; the message names it.
    """
    trainer_mesh, sampler_mesh = make_meshes(config.mesh, devices)
    if devices is None:
        check_processes(config.mesh, trainer_mesh, sampler_mesh)
    objective, options = objective_of(config.objective)
    learner = make_learner(
        config,
        architecture,
        trainer_mesh,
        max_response_tokens=config.sampler.max_response_tokens,
        group_size=config.sampler.group_size,
        objective=objective,
        options=options,
        temperature=config.sampler.temperature,
        vocab_size=vocab_size,
        updates_per_batch=config.learner.updates_per_batch,
        kl_weight=config.objective.kl_weight,
    )
    trainers, samplers = Team("trainers", processes_of(trainer_mesh)), Team("samplers", processes_of(sampler_mesh))
    params, chunk_mib = learner.shapes.params, config.window.sync_chunk_mib
    on_sampler = WeightSync(params, sampler_mesh, config.sampler.dtype, chunk_mib)
    is_direct = devices is not None or trainers.members == samplers.members
    sync = on_sampler if is_direct else WeightSync(params, trainer_mesh, config.sampler.dtype, chunk_mib, TRAINER_RULES)

    usable = usable_bytes(sampler_mesh) if usable is None else usable
    weights, optimizer, gradient = learner_bytes(learner.shapes)
    reference = weights if learner.keeps_reference else 0
    is_colocated = trainer_mesh is sampler_mesh
    has_second_policy = evaluates_within_windows(config)
    replicas = replica_meshes(sampler_mesh)
    described = replica_devices(replicas[0].size)
    if described is not None:
        first = replicas[0]
        replicas = [Mesh(np.array(described, dtype=object).reshape(first.devices.shape), first.axis_names)]
    try:
        engines = make_engines(
            config,
            architecture,
            sampler_mesh,
            vocab_size=vocab_size,
            stop_ids=stop_ids,
            max_prompt_tokens=config.data.max_prompt_tokens,
            others=[SamplingDistribution.of(config.sampler, config.evaluation)],
            free=usable - (weights + optimizer + reference if is_colocated else 0),
            num_copies=2 if has_second_policy else 1,
            meshes=None if devices is None else replicas[:1],
        )
    except NoRoomError:
        if not may_lack_room:
            raise
        engines = ()
    copy = device_bytes(on_sampler.abstract(params))
    account = Account(
        weights=weights,
        optimizer=optimizer,
        gradient=gradient,
        reference=reference,
        sampler_weights=copy,
        prepared_weights=copy * num_prepared(architecture, replicas[0]) / architecture.num_params,
        evaluation_weights=copy if has_second_policy else 0,
        kv_cache=cache_bytes(engines[0]) if engines else 0,
        is_colocated=is_colocated,
    )
    return Assembly(
        config, architecture, trainer_mesh, sampler_mesh, learner, sync, engines, account, trainers, samplers
    )


def evaluates_within_windows(config: TrainConfig) -> bool:
    """Whether the sampler holds two policies at times: that of the window, and one that is evaluated."""
    if config.offline is not None or not config.evaluation.prompts:  # offline: after each epoch
        return bool(config.evaluation.prompts)
    every = config.evaluation.every
    return bool(every) and every % config.window.sync_every != 0


def _describe_mesh(mesh: Mesh) -> str:
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return f"{axes} on {mesh.size} {mesh.devices.flat[0].device_kind} device{'s' if mesh.size > 1 else ''}"
