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

from oapl_jax import policy, sft
from oapl_jax.config import GenerateConfig, TrainConfig
from oapl_jax.data.prompts import PromptSource, TaskPromptSource, held_out, load_prompts
from oapl_jax.learner import batch as batches
from oapl_jax.learner.state import TrainState, init_state, make_optimizer, make_schedule
from oapl_jax.learner.step import make_advantage_fn, make_loss_fn, make_train_step
from oapl_jax.model import qwen
from oapl_jax.objectives import oapl
from oapl_jax.rewards.grader import Grader, make_grader
from oapl_jax.rollouts.buffer import Consumption, GroupBuffer
from oapl_jax.sampler.engine import Engine
from oapl_jax.sampler.engines import PAGE_SIZE, make_replica_engines
from oapl_jax.sampler.replicas import replica_meshes
from oapl_jax.sampler.sampling import SamplingParams
from oapl_jax.sharding import make_meshes
from oapl_jax.sync import WeightSync
from oapl_jax.tokenizer import Tokenizer
from oapl_jax.types import Prompt, RolloutGroup
from oapl_jax.worker import GroupMaker

FEWEST_USABLE = 2
"""Usable rollouts that a group must have: V* of one rollout is its own reward."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run works with; the state that it changes is not here."""

    config: TrainConfig
    trainer_mesh: Mesh
    sampler_mesh: Mesh
    model_config: qwen.QwenConfig
    graphdef: Any
    tokenizer: Tokenizer
    prompts: PromptSource | TaskPromptSource
    held_out: list[Prompt]
    grader: Grader
    engines: tuple[Engine, ...]
    """One for each replica of the sampler."""
    sync: WeightSync
    rows: batches.RowLayout
    train_step: Any
    state_shardings: TrainState
    sampler_lock: AbstractContextManager
    """Held while a program runs on the sampler's mesh, where that has several devices (see ``Scheduler``)."""
    trainer_lock: AbstractContextManager
    """The same for the trainer's mesh; the same lock where the two meshes are one."""

    @property
    def groups_per_batch(self) -> int:
        """N: groups of one learner step."""
        return self.config.learner.batch_rollouts // self.config.sampler.group_size

    @property
    def sampling(self) -> SamplingParams:
        """The law of training rollouts."""
        return SamplingParams.of(self.config.sampler)

    @property
    def evaluation_sampling(self) -> SamplingParams:
        """The law of evaluation samples."""
        return SamplingParams.of(self.config.evaluation)

    def make_groups(self) -> GroupMaker:
        """What grades the sampler's rollouts, with the objective's advantages."""
        return make_group_maker(self.config, self.tokenizer, self.grader)

    def make_buffer(self) -> GroupBuffer:
        """An empty buffer that accepts what the objective's options leave in."""
        window = self.config.window
        consumption = Consumption(
            window.order, window.epochs, window.max_uses, window.min_groups, seed=self.config.run.seed
        )
        return GroupBuffer(acceptance(self.config), window.max_groups_ahead, consumption)


def make_group_maker(config: TrainConfig, tokenizer: Tokenizer, grader: Grader) -> GroupMaker:
    """What grades a sampler's rollouts, with the objective's advantages."""
    value = functools.partial(oapl.optimal_value, beta1=config.objective.beta1)
    return GroupMaker(tokenizer.decode, grader, make_advantage_fn(config.objective), value)


def acceptance(config: TrainConfig) -> Callable[[RolloutGroup], bool]:
    """Which groups the learner wants."""
    drop_equal = config.objective.drop_equal_reward_groups

    def is_accepted(group: RolloutGroup) -> bool:
        return len(group.usable) >= FEWEST_USABLE and not (drop_equal and batches.has_equal_rewards(group))

    return is_accepted


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
    prompts = load_prompts(config.data, loaded.tokenizer, config.run.seed)
    held_out_prompts = held_out(config, loaded.tokenizer)
    grader = make_grader(config)
    grader.check_golds([*prompts.prompts, *held_out_prompts])
    schedule = make_schedule(config.learner, config.run.steps)
    optimizer = make_optimizer(config.learner, schedule)
    abstract_params = jax.eval_shape(lambda params: params, loaded.params)
    state, shardings = init_state(loaded.params, optimizer, trainer_mesh)
    train_step = make_train_step(
        loaded.graphdef,
        optimizer,
        schedule,
        make_loss_fn(config.objective),
        beta2=config.objective.beta2,
        temperature=config.sampler.temperature,
        vocab_size=loaded.tokenizer.vocab_size,
        mesh=trainer_mesh,
        shardings=shardings,
    )
    engines = make_engines(
        config, loaded.config, loaded.tokenizer.vocab_size, loaded.tokenizer.stop_ids, replica_meshes(sampler_mesh)
    )
    sampler_lock = threading.RLock() if sampler_mesh.size > 1 else contextlib.nullcontext()
    job = Job(
        config=config,
        trainer_mesh=trainer_mesh,
        sampler_mesh=sampler_mesh,
        model_config=loaded.config,
        graphdef=loaded.graphdef,
        tokenizer=loaded.tokenizer,
        prompts=prompts,
        held_out=held_out_prompts,
        grader=grader,
        engines=engines,
        sync=WeightSync(abstract_params, sampler_mesh, config.sampler.dtype, config.window.sync_chunk_mib),
        rows=rows,
        train_step=train_step,
        state_shardings=shardings,
        sampler_lock=sampler_lock,
        trainer_lock=sampler_lock if trainer_mesh is sampler_mesh else contextlib.nullcontext(),
    )
    return job, state


def make_engines(
    config: TrainConfig | GenerateConfig,
    model_config: qwen.QwenConfig,
    vocab_size: int,
    stop_ids: Sequence[int],
    meshes: Sequence[Mesh],
    device_free: float | None = None,
) -> tuple[Engine, ...]:
    """An engine for each replica of the sampler's mesh.

    Args:
        config: of the run.
        model_config: the policy's architecture.
        vocab_size: the tokenizer's length.
        stop_ids: tokens that end a response.
        meshes: of the replicas.
        device_free: bytes that weights and cache find free on each device; None: ask the devices.

    Raises:
        ValueError: the rows do not divide over the replicas; the memory has no room for one sequence.
    """
    sampler = config.sampler
    rows, replicas = sampler.groups_in_flight * sampler.group_size, len(meshes)
    if rows % replicas:
        raise ValueError(
            f"sampler.groups_in_flight={sampler.groups_in_flight} x group_size={sampler.group_size}: {rows} rows do not"
            f" divide over the {replicas} replicas of the sampler's mesh"
        )
    laws = [sampler, *([config.evaluation] if isinstance(config, TrainConfig) else [])]
    return make_replica_engines(
        sampler,
        model_config,
        meshes,
        num_rows=rows,
        compute_dtype=config.model.compute_dtype,
        vocab_size=vocab_size,
        stop_ids=stop_ids,
        max_prompt_tokens=config.data.max_prompt_tokens,
        can_truncate=any(SamplingParams.of(section).truncates for section in laws),
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
        "sampler": f"{len(job.engines)} x {job.engines[0].num_rows} rows, {job.engines[0].num_pages:,} pages of"
        f" {PAGE_SIZE} tokens of KV cache",
        "sampler bytes": f"weights {copy * len(job.engines):,} + KV cache {sum(e.cache_bytes for e in job.engines):,}, over"
        " the mesh; both twice while an evaluation runs in the course of training",
    }
    return "\n".join(f"{name:>14}  {text}" for name, text in rows.items())


def start_of(config: TrainConfig | GenerateConfig, make_warm_start: bool = True) -> tuple[Any, str | None]:
    """The model section to load by, and the folder of the weights (None: random ones).

    Args:
        config: of the run.
        make_warm_start: make the supervised warm start where it does not exist.
    """
    if config.model.warm_start is None:
        return config.model, config.model.path
    warm_start = sft.load_config(config.model.warm_start)
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
