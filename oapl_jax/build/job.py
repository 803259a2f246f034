"""The set-up of an online run: everything that its config names, loaded and checked, and the plan of it."""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.sharding import Mesh

from oapl_jax.build import policy
from oapl_jax.build.checks import objective_of
from oapl_jax.build.engines import PAGE_SIZE, make_replica_engines
from oapl_jax.config.commands import GenerateConfig, TrainConfig
from oapl_jax.data.prompts import PromptSource, TaskPromptSource, held_out, load_prompts
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.distributed.processes import Processes
from oapl_jax.distributed.sharding import (
    SAMPLER_RULES,
    TRAINER_RULES,
    check_processes,
    make_meshes,
    processes_of,
    shardings,
)
from oapl_jax.distributed.transfer import Transfer
from oapl_jax.evaluation.held_out import Counts, evaluate
from oapl_jax.learner import batch as batches
from oapl_jax.learner.state import TrainState, init_state, make_optimizer, make_schedule
from oapl_jax.learner.step import make_train_step
from oapl_jax.model import qwen
from oapl_jax.objectives import oapl
from oapl_jax.rewards.grader import Grader, make_grader
from oapl_jax.rollouts.buffer import Consumption, GroupBuffer
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.rollouts.shards import ShardQueue
from oapl_jax.sampler.engine import Engine
from oapl_jax.sampler.replicas import replica_meshes
from oapl_jax.sft import sft
from oapl_jax.sources.local import GroupMaker, Worker
from oapl_jax.types import Prompt, RolloutGroup
from oapl_jax.weights.sync import WeightSync

FEWEST_USABLE = 2
"""Usable rollouts that a group must have: V* of one rollout is its own reward."""


@dataclasses.dataclass(frozen=True)
class SamplerJob:
    """What sampling and grading work with; all that a process has which does not train."""

    config: TrainConfig
    sampler_mesh: Mesh
    model_config: qwen.QwenConfig
    tokenizer: Tokenizer
    prompts: PromptSource | TaskPromptSource
    held_out: list[Prompt]
    grader: Grader
    engines: tuple[Engine, ...]
    """One for each replica of the sampler in this process."""
    sampler_lock: AbstractContextManager
    """Held while a program runs on the sampler's mesh, where that has several devices (see ``Scheduler``)."""
    trainers: Processes
    samplers: Processes
    transfer: Transfer | None
    """Takes the weights to the samplers' processes, where these are not the trainers'."""

    @property
    def groups_per_batch(self) -> int:
        """N: groups of one learner step."""
        return self.config.learner.batch_rollouts // self.config.sampler.group_size

    @property
    def sampling(self) -> SamplingDistribution:
        """The distribution of training rollouts."""
        return SamplingDistribution.of(self.config.sampler)

    @property
    def evaluation_sampling(self) -> SamplingDistribution:
        """The distribution of evaluation samples."""
        return SamplingDistribution.of(self.config.evaluation)

    @property
    def first_lengths(self) -> set[int]:
        """Tokens of the first prompts: for these the sampler compiles before it begins."""
        return {len(self.prompts[i].token_ids) for i in range(self.config.sampler.groups_in_flight)}

    def make_groups(self) -> GroupMaker:
        """What grades the sampler's rollouts, with the objective's advantages."""
        return make_group_maker(self.config, self.tokenizer, self.grader)

    def make_worker(self, buffer: GroupBuffer | ShardQueue, log: RolloutLog | ShardQueue) -> Worker:
        """The sampler of this process, in threads."""
        return Worker(
            self.engines,
            self.prompts,
            self.make_groups(),
            buffer,
            log,
            sampling=self.sampling,
            group_size=self.config.sampler.group_size,
            seed=self.config.run.seed,
            device_lock=self.sampler_lock,
            finish_old=self.config.window.unfinished == "finish",
        )

    def count_held_out(self, params: Any, num_samples: int, part: int = 0, num_parts: int = 1) -> Counts:
        """Samples and grades held-out prompts; see ``evaluation.held_out.evaluate``."""
        return evaluate(
            self.engines,
            params,
            self.held_out,
            self.tokenizer.decode,
            self.grader,
            sampling=self.evaluation_sampling,
            num_samples=num_samples,
            seed=self.config.run.seed,
            device_lock=self.sampler_lock,
            part=part,
            num_parts=num_parts,
        )


@dataclasses.dataclass(frozen=True)
class Job(SamplerJob):
    """What a run works with; the state that it changes is not here."""

    trainer_mesh: Mesh
    graphdef: Any
    sync: WeightSync
    """Makes the sampler's copy: on its mesh, or on the trainer's where ``transfer`` takes it from there."""
    rows: batches.RowLayout
    train_step: Any
    state_shardings: TrainState
    trainer_lock: AbstractContextManager
    """As ``sampler_lock``, for the trainer's mesh; the same lock where the two meshes are one."""

    def make_buffer(self) -> GroupBuffer:
        """An empty buffer that accepts what the objective's options leave in."""
        window = self.config.window
        consumption = Consumption(
            window.order, window.epochs, window.max_uses, window.min_groups, seed=self.config.run.seed
        )
        return GroupBuffer(acceptance(self.config), window.max_groups_ahead, consumption)


def make_group_maker(config: TrainConfig, tokenizer: Tokenizer, grader: Grader) -> GroupMaker:
    """What grades a sampler's rollouts, with the objective's advantages."""
    objective, options = objective_of(config.objective)
    value = functools.partial(oapl.optimal_value, beta1=oapl.options_or_defaults(options).beta1)
    return GroupMaker(
        tokenizer.decode, grader, lambda rewards, is_correct: objective.advantages(rewards, is_correct, options), value
    )


def acceptance(config: TrainConfig) -> Callable[[RolloutGroup], bool]:
    """Which groups the learner wants."""
    drop_equal = config.objective.drop_equal_reward_groups

    def is_accepted(group: RolloutGroup) -> bool:
        return len(group.usable) >= FEWEST_USABLE and not (drop_equal and batches.has_equal_rewards(group))

    return is_accepted


def is_trainer(config: TrainConfig) -> bool:
    """Whether this process trains: it has devices of the trainer's mesh.

    Raises:
        ValueError: the meshes do not fit the devices or the processes.
    """
    trainer_mesh, sampler_mesh = make_meshes(config.mesh)
    check_processes(config.mesh, trainer_mesh, sampler_mesh)
    return jax.process_index() in processes_of(trainer_mesh)


def make_sampler_job(config: TrainConfig) -> SamplerJob:
    """Loads and checks what a process needs that only samples: no weights, these come from the trainers.

    Raises:
        ValueError: anything that the config got wrong; the message names it.
    """
    model, path = start_of(config, make_warm_start=False)
    return _make_sampler_job(config, *make_meshes(config.mesh), *policy.outline(model, path))


def make_job(config: TrainConfig, *, make_warm_start: bool = True) -> tuple[Job, TrainState]:
    """Loads and checks everything, and returns the job and the state at step 0.

    Args:
        config: of the run.
        make_warm_start: make the supervised warm start where it does not exist; False for a plan.

    Raises:
        ValueError: anything that the config got wrong; the message names it.
    """
    trainer_mesh, sampler_mesh = make_meshes(config.mesh)
    rows = batches.RowLayout(
        config.learner.batch_rollouts,
        config.data.max_prompt_tokens + config.sampler.max_response_tokens,
        config.learner.row_tokens,
        config.learner.micro_batch_rows,
        trainer_mesh,
    )
    model, path = start_of(config, make_warm_start)
    loaded = policy.load(model, path, trainer_mesh, config.run.seed, config.lora)
    side = _make_sampler_job(config, trainer_mesh, sampler_mesh, loaded.config, loaded.tokenizer)
    schedule = make_schedule(config.learner, config.run.steps)
    optimizer = make_optimizer(config.learner, schedule)
    abstract_params = jax.eval_shape(lambda params: params, loaded.params)
    state, state_shardings = init_state(loaded.params, optimizer, trainer_mesh)
    train_step = make_train_step(
        loaded.graphdef,
        optimizer,
        schedule,
        *objective_of(config.objective),
        temperature=config.sampler.temperature,
        vocab_size=loaded.tokenizer.vocab_size,
        mesh=trainer_mesh,
        shardings=state_shardings,
    )
    job = Job(
        **{field.name: getattr(side, field.name) for field in dataclasses.fields(side)},
        trainer_mesh=trainer_mesh,
        graphdef=loaded.graphdef,
        sync=_make_sync(config, abstract_params, trainer_mesh, sampler_mesh),
        rows=rows,
        train_step=train_step,
        state_shardings=state_shardings,
        trainer_lock=side.sampler_lock if trainer_mesh is sampler_mesh else contextlib.nullcontext(),
    )
    return job, state


def _make_sampler_job(
    config: TrainConfig, trainer_mesh: Mesh, sampler_mesh: Mesh, model: qwen.QwenConfig, tokenizer: Tokenizer
) -> SamplerJob:
    prompts = load_prompts(config.data, tokenizer, config.run.seed)
    held_out_prompts = held_out(config, tokenizer)
    grader = make_grader(config)
    grader.check_golds([*prompts.prompts, *held_out_prompts])
    trainers = Processes("trainers", processes_of(trainer_mesh))
    samplers = Processes("samplers", processes_of(sampler_mesh))
    return SamplerJob(
        config=config,
        sampler_mesh=sampler_mesh,
        model_config=model,
        tokenizer=tokenizer,
        prompts=prompts,
        held_out=held_out_prompts,
        grader=grader,
        engines=make_engines(config, model, tokenizer.vocab_size, tokenizer.stop_ids, replica_meshes(sampler_mesh)),
        sampler_lock=threading.RLock() if sampler_mesh.size > 1 else contextlib.nullcontext(),
        trainers=trainers,
        samplers=samplers,
        transfer=None
        if _are_together(trainer_mesh, sampler_mesh)
        else _make_transfer(config, model, trainer_mesh, sampler_mesh),
    )


def _are_together(trainer_mesh: Mesh, sampler_mesh: Mesh) -> bool:
    """Every process that trains samples too."""
    return processes_of(trainer_mesh) == processes_of(sampler_mesh)


def _make_sync(config: TrainConfig, params: Any, trainer_mesh: Mesh, sampler_mesh: Mesh) -> WeightSync:
    dtype, chunk_mib = config.sampler.dtype, config.window.sync_chunk_mib
    if _are_together(trainer_mesh, sampler_mesh):
        return WeightSync(params, sampler_mesh, dtype, chunk_mib)
    return WeightSync(params, trainer_mesh, dtype, chunk_mib, TRAINER_RULES)


def _make_transfer(config: TrainConfig, model: qwen.QwenConfig, trainer_mesh: Mesh, sampler_mesh: Mesh) -> Transfer:
    _, params = policy.abstract(config.model, model, trainer_mesh, config.lora)
    copy = _make_sync(config, params, trainer_mesh, sampler_mesh).abstract(params)
    everyone = Processes("transfer", [*processes_of(trainer_mesh), *processes_of(sampler_mesh)])
    target = shardings(copy, sampler_mesh, SAMPLER_RULES)
    return Transfer(copy, target, config.window.sync_chunk_mib * 2**20, everyone.wait)


def make_engines(
    config: TrainConfig | GenerateConfig,
    model_config: qwen.QwenConfig,
    vocab_size: int,
    stop_ids: Sequence[int],
    meshes: Sequence[Mesh],
    device_free: float | None = None,
) -> tuple[Engine, ...]:
    """An engine for each replica of the sampler's mesh that this process has.

    Args:
        config: of the run.
        model_config: the policy's architecture.
        vocab_size: the tokenizer's length.
        stop_ids: tokens that end a response.
        meshes: of the replicas; those of other processes get no engine here.
        device_free: bytes that weights and cache find free on each device; None: ask the devices.

    Raises:
        ValueError: the rows do not divide over the replicas; the memory has no room for one sequence.
    """
    sampler = config.sampler
    rows, replicas = sampler.groups_in_flight * sampler.group_size, len(meshes)
    here = [mesh for mesh in meshes if jax.process_index() in processes_of(mesh)]
    if not here:
        return ()
    if rows % replicas:
        raise ValueError(
            f"sampler.groups_in_flight={sampler.groups_in_flight} x group_size={sampler.group_size}: {rows} rows do not"
            f" divide over the {replicas} replicas of the sampler's mesh"
        )
    distributions = [sampler, *([config.evaluation] if isinstance(config, TrainConfig) else [])]
    return make_replica_engines(
        sampler,
        model_config,
        here,
        num_rows=rows * len(here) // replicas,
        compute_dtype=config.model.compute_dtype,
        vocab_size=vocab_size,
        stop_ids=stop_ids,
        max_prompt_tokens=config.data.max_prompt_tokens,
        can_truncate=any(SamplingDistribution.of(section).truncates for section in distributions),
        device_free=device_free,
    )


def describe(job: Job, state: TrainState) -> str:
    """The plan of a run, for people: sizes, meshes, tokens and bytes."""
    config, learner = job.config, job.config.learner
    params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    weights, moments, gradient, copy = (
        _num_bytes(tree)
        for tree in (state.params, state.opt_state, state.stored.params, job.sync.abstract(state.params))
    )
    windows = -(-config.run.steps // config.window.sync_every)
    rows = {
        "model": f"{job.model_config.model_type}, {params:,} parameters, {job.tokenizer.vocab_size:,} of"
        f" {job.model_config.vocab_size:,} vocabulary rows in use",
        "trainer mesh": _describe_mesh(job.trainer_mesh),
        "sampler mesh": "the trainer's" if job.sampler_mesh is job.trainer_mesh else _describe_mesh(job.sampler_mesh),
        "run": f"{config.run.steps:,} steps in {windows:,} windows of {config.window.sync_every}"
        if config.offline is None
        else f"at most {config.run.steps:,} steps in {len(config.offline.rounds)} rounds of finished data",
        "batch": f"{learner.batch_rollouts} rollouts = {job.groups_per_batch} prompts x G={config.sampler.group_size},"
        f" at most {learner.batch_rollouts * job.rows.max_tokens:,} tokens a step",
        "prompts": _describe_prompts(job),
        "trainer bytes": f"weights {weights:,} + optimizer {moments:,} + gradient {gradient:,}, over the mesh",
        **_describe_engines(job.engines, copy),
    }
    return "\n".join(f"{name:>14}  {text}" for name, text in rows.items())


def _describe_engines(engines: Sequence[Engine], num_bytes: int) -> dict[str, str]:
    if not engines:
        return {"sampler": "in other processes of the job"}
    return {
        "sampler": f"{len(engines)} x {engines[0].num_rows} rows, {engines[0].num_pages:,} pages of {PAGE_SIZE} tokens of"
        " KV cache",
        "sampler bytes": f"weights {num_bytes * len(engines):,} + KV cache {sum(e.cache_bytes for e in engines):,}, over"
        " the devices of this process; both twice while an evaluation runs in the course of training",
    }


def start_of(config: TrainConfig | GenerateConfig, make_warm_start: bool = True) -> tuple[Any, str | None]:
    """The model section to load by, and the folder of the weights (None: random ones).

    Args:
        config: of the run.
        make_warm_start: make the supervised warm start where it does not exist.
    """
    if config.model.warm_start is None:
        return config.model, config.model.path
    warm_start = sft.load_config(config.model.warm_start)
    if jax.process_count() > 1 and not sft.is_finished(warm_start):
        raise ValueError(
            f"model.warm_start={config.model.warm_start}: it is made by one process; run it first: python -m oapl_jax sft"
            f" --config {config.model.warm_start}"
        )
    if make_warm_start or sft.is_finished(warm_start):
        return config.model, str(sft.ensure(warm_start))
    tokenizer = config.model.tokenizer if config.model.tokenizer != "model" else warm_start.model.tokenizer
    return warm_start.model.model_copy(update={"tokenizer": tokenizer}), warm_start.model.path


def _describe_mesh(mesh: Mesh) -> str:
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return f"{axes} on {mesh.size} {mesh.devices.flat[0].device_kind} device{'s' if mesh.size > 1 else ''}"


def _describe_prompts(job: Job) -> str:
    task, prompts = job.config.data.task, job.prompts
    size = f"{task} task" if task else f"{len(prompts):,} ({prompts.num_dropped:,} overlong dropped)"
    return f"{size}; {len(job.held_out):,} held out"


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
