"""The programs of a run and the memory they find, from its config alone: shapes and shardings, no weights, no data.

This is where preflight meets the rest: it builds what ``job.make_job`` builds, with abstract arguments and for
devices that may only be described (``topology.py``). Nothing is compiled here.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from oapl_jax.build import policy
from oapl_jax.build.checks import objective_of
from oapl_jax.build.engines import PAGE_SIZE, cache_dtype
from oapl_jax.build.job import make_engines
from oapl_jax.config.commands import TrainConfig
from oapl_jax.config.model import ModelConfig
from oapl_jax.distributed.sharding import (
    TRAINER_RULES,
    device_bytes,
    make_meshes,
    placed,
    platform_of,
    row_shards,
    shardings,
)
from oapl_jax.learner import batch as batches
from oapl_jax.learner.batch import RowLayout
from oapl_jax.learner.state import TrainState, abstract_state, make_optimizer, make_schedule
from oapl_jax.learner.step import make_scorer, make_train_step
from oapl_jax.model import qwen
from oapl_jax.model.logprob import chunk_tokens
from oapl_jax.sampler import kv_cache
from oapl_jax.sampler.engine import Engine
from oapl_jax.sampler.replicas import replica_meshes
from oapl_jax.sft import sft
from oapl_jax.types import TrainBatch
from oapl_jax.weights.sync import WeightSync

MODELS = pathlib.Path("configs/models")
"""Architectures of models on the Hugging Face hub, so that preflight needs no network."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """What lies on a device from the start of a run to its end, in bytes."""

    weights: float
    optimizer: float
    gradient: float
    """Not all of the time: while a train step runs, at least."""
    sampler_weights: float
    kv_cache: float
    is_colocated: bool
    """Trainer and sampler share their devices; else these are two kinds of device."""

    @property
    def state(self) -> float:
        """The learner's."""
        return self.weights + self.optimizer

    @property
    def sampler(self) -> float:
        """The sampler's."""
        return self.sampler_weights + self.kv_cache


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program of a run."""

    name: str
    lower: Callable[[], Any]
    """Traces it for its devices; ``.compile()`` of what it returns needs their compiler."""
    mesh: Mesh
    beside: float
    """Bytes of a device that are taken while it runs and are not its arguments."""
    model_flops: float
    """Of the model's mathematics, over all devices: nothing computed twice, attention to visible tokens only."""
    kernel_flops: float
    """The share of attention in them, which is not in the program's text where kernels do it."""
    kernel_bytes: float
    """Bytes that attention kernels read on a device: of the cache, in decode steps."""
    expected_trips: tuple[float, ...] = ()
    """Of loops whose end only the run knows, the outer ones first."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on given devices."""

    config: TrainConfig
    model: qwen.QwenConfig
    source: str
    """Where the architecture was read from."""
    trainer_mesh: Mesh
    sampler_mesh: Mesh
    rows: RowLayout
    memory: Memory
    engine: Engine | None
    """Of one replica; None where there is no room for a single rollout."""
    programs: tuple[Program, ...]
    """None where the memory is too little before anything is compiled."""

    @property
    def num_replicas(self) -> int:
        """Of the sampler."""
        return self.sampler_mesh.size // self.sampler_mesh.shape["tensor"]

    @property
    def max_tokens(self) -> int:
        """Limit of a rollout, prompt and response."""
        return self.rows.max_tokens


def make_plan(
    config: TrainConfig,
    devices: Sequence[Any],
    usable_bytes: float,
    replica_devices: Callable[[int], Sequence[Any] | None] = lambda num_devices: None,
) -> Plan:
    """Builds the programs of a run on these devices.

    Args:
        config: of the run.
        devices: real ones or described ones.
        usable_bytes: memory of each.
        replica_devices: so many devices to compile the sampler's programs for, where the first of ``devices`` do not
            do: libtpu takes a part of a described slice only where its ids are the first ones.

    Raises:
        ValueError: what the config got wrong; the message names it.
    """
    trainer_mesh, sampler_mesh = make_meshes(config.mesh, devices)
    section, source = _model_section(config)
    model = policy.read_config(pathlib.Path(source))
    graphdef, params = policy.abstract(section, model, trainer_mesh, config.lora)
    schedule = make_schedule(config.learner, config.run.steps)
    optimizer = make_optimizer(config.learner, schedule)
    shapes = abstract_state(params, optimizer)
    places = shardings(shapes, trainer_mesh, TRAINER_RULES)
    state = placed(shapes, places)
    sync = WeightSync(params, sampler_mesh, config.sampler.dtype, config.window.sync_chunk_mib)
    sampler_params = sync.abstract(params)

    is_colocated = trainer_mesh is sampler_mesh
    memory = Memory(
        weights=device_bytes(state.params),
        optimizer=device_bytes(state.opt_state),
        gradient=device_bytes(state.stored.params),
        sampler_weights=device_bytes(sampler_params),
        kv_cache=0,
        is_colocated=is_colocated,
    )
    free = usable_bytes - (memory.state if is_colocated else 0)
    replicas = replica_meshes(sampler_mesh)
    alone = replica_devices(replicas[0].size)
    if alone is not None:
        first = replicas[0]
        replicas = [Mesh(np.array(alone, dtype=object).reshape(first.devices.shape), first.axis_names)] * len(replicas)
    engine = _make_engine(config, model, replicas, free)
    if engine is not None:
        memory = dataclasses.replace(memory, kv_cache=engine.cache_bytes / kv_shards(model, engine.mesh))
    rows = RowLayout(
        config.learner.batch_rollouts,
        config.data.max_prompt_tokens + config.sampler.max_response_tokens,
        config.learner.row_tokens,
        config.learner.micro_batch_rows,
        trainer_mesh,
    )
    plan = Plan(config, model, source, trainer_mesh, sampler_mesh, rows, memory, engine, ())
    if engine is None or shortage(plan, usable_bytes) > 0:
        return plan
    step = make_train_step(
        graphdef,
        optimizer,
        schedule,
        *objective_of(config.objective),
        temperature=config.sampler.temperature,
        vocab_size=model.vocab_size,
        mesh=trainer_mesh,
        shardings=places,
    )
    learner = _learner_programs(plan, graphdef, step, state)
    return dataclasses.replace(plan, programs=(*learner, *_sampler_programs(plan, engine, sync, state.params)))


def shortage(plan: Plan, usable_bytes: float) -> float:
    """Bytes that a device lacks for what lies on it for certain, before anything is compiled; negative: left over."""
    memory = plan.memory
    trainer = memory.state + memory.gradient
    if memory.is_colocated:
        return trainer + memory.sampler - usable_bytes
    return max(trainer, memory.sampler) - usable_bytes


def kv_bytes(plan: Plan) -> float:
    """Bytes on each device of a replica that the keys and values of one rollout of full length take."""
    pages = -(-plan.max_tokens // PAGE_SIZE)
    return pages * _page_bytes(plan.config, plan.model) / kv_shards(plan.model, plan.sampler_mesh)


def kv_shards(model: qwen.QwenConfig, mesh: Mesh) -> int:
    """Devices that share a replica's cache; where they do not divide the kv heads each has all of it."""
    tensor = mesh.shape["tensor"]
    return tensor if model.num_key_value_heads % tensor == 0 else 1


def _learner_programs(plan: Plan, graphdef: Any, step: Any, state: TrainState) -> list[Program]:
    config, mesh, memory = plan.config, plan.trainer_mesh, plan.memory
    batch = _full_batch(plan.rows, mesh)
    score = make_scorer(graphdef, temperature=config.sampler.temperature, vocab_size=plan.model.vocab_size)
    num_micro_batches, num_rows, length = batch.tokens.shape
    # Rows are full of rollouts of full length, and all tokens are scored.
    tokens = num_micro_batches * num_rows * length
    pairs = tokens * (plan.max_tokens + 1) / 2
    forward, attention = forward_flops(plan.model, tokens, pairs, tokens)
    beside = memory.sampler if memory.is_colocated else 0
    chunks = num_chunks(num_rows * length / row_shards(mesh) / mesh.shape["context"], plan.model, mesh)
    micro_batches = (num_micro_batches,) if num_micro_batches > 1 else ()
    make = functools.partial(Program, mesh=mesh, kernel_bytes=0)
    return [
        make(
            "train_step",
            functools.partial(step.lower, state, batch),
            beside=beside,
            # The backward pass has two products for each one of the forward pass, one where the weights are frozen.
            model_flops=(2 if config.lora.rank else 3) * (forward - attention) + 3 * attention,
            kernel_flops=3 * attention,
            expected_trips=(*micro_batches, chunks),
        ),
        make(
            "score",
            functools.partial(score.lower, state.params, batch),
            beside=memory.optimizer + beside,
            model_flops=forward,
            kernel_flops=attention,
            expected_trips=(chunks,),
        ),
    ]


def _full_batch(layout: RowLayout, mesh: Mesh) -> TrainBatch:
    """The largest batch, as shapes on the trainer's mesh."""
    num_rows, length = layout.num_rows(layout.num_rollouts), layout.row_length(layout.max_tokens)
    at_once = layout.micro_batch_rows or num_rows
    places = batches.shardings(mesh)

    def array(name: str, dtype: Any, width: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((num_rows // at_once, at_once, width), dtype, sharding=getattr(places, name))

    integers = {name: array(name, jnp.int32, length) for name in ("tokens", "positions", "segment_ids")}
    return TrainBatch(
        **integers,
        response_mask=array("response_mask", bool, length),
        sampler_logprobs=array("sampler_logprobs", jnp.float32, length),
        advantages=array("advantages", jnp.float32, layout.max_segments),
        segment_mask=array("segment_mask", bool, layout.max_segments),
    )


def num_chunks(tokens: float, model: qwen.QwenConfig, mesh: Mesh) -> int:
    """Chunks in which a device computes the logits of so many tokens."""
    num_ids = model.vocab_size // mesh.shape["tensor"]
    return math.ceil(tokens / chunk_tokens(num_ids, platform_of(mesh)))


def _sampler_programs(plan: Plan, engine: Engine, sync: WeightSync, params: Any) -> list[Program]:
    config, model, memory = plan.config, plan.model, plan.memory
    replica_params = WeightSync(params, engine.mesh, config.sampler.dtype).abstract(params)
    state = memory.state if memory.is_colocated else 0
    # An evaluation in the course of training has weights and a cache of its own, beside those of the window.
    twice = memory.sampler if config.evaluation.every else 0
    length = engine.padded_length(engine.max_prompt_tokens)
    prompts = engine.prompts_at_once(length)
    prefill = forward_flops(model, prompts * length, prompts * length * (length + 1) / 2, prompts)
    tokens = engine.num_rows * engine.decode_steps
    # Rows are on average half-way through their response, as far as there are pages.
    visible = min(
        config.data.max_prompt_tokens + config.sampler.max_response_tokens / 2,
        engine.num_pages * PAGE_SIZE / engine.num_rows,
    )
    decode = forward_flops(model, tokens, tokens * visible, tokens)
    kv_token = _page_bytes(config, model) / PAGE_SIZE / kv_shards(model, engine.mesh)
    programs = [
        Program(
            "prefill",
            functools.partial(engine.lower_prefill, replica_params),
            engine.mesh,
            beside=state + memory.kv_cache + twice,
            model_flops=prefill[0],
            kernel_flops=prefill[1],
            kernel_bytes=0,
        ),
        Program(
            "decode",
            functools.partial(engine.lower_generate, replica_params),
            engine.mesh,
            beside=state + twice,
            model_flops=decode[0],
            kernel_flops=decode[1],
            kernel_bytes=tokens * visible * kv_token,
            expected_trips=(engine.decode_steps,),
        ),
    ]
    copy = sync.program(params)
    if copy is not None:
        # The sampler has its old weights until the new ones are complete.
        beside = memory.optimizer + (memory.sampler if memory.is_colocated else 0)
        programs.append(Program("sync", functools.partial(copy[0].lower, copy[1]), plan.trainer_mesh, beside, 0, 0, 0))
    return programs


def forward_flops(model: qwen.QwenConfig, tokens: float, pairs: float, scored: float) -> tuple[float, float]:
    """FLOPs of a forward pass of a dense model, and of its attention alone; an addition counts as a multiplication does.

    Args:
        model: the architecture.
        tokens: that go through the layers.
        pairs: (token, token that it sees), over all sequences.
        scored: tokens whose logits are computed.
    """
    embedding = model.vocab_size * model.hidden_size
    num_matrix_weights = model.num_params - embedding * (1 if model.tie_word_embeddings else 2)
    attention = 4.0 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * pairs
    return 2.0 * num_matrix_weights * tokens + 2.0 * embedding * scored + attention, attention


def _model_section(config: TrainConfig) -> tuple[ModelConfig, str]:
    """The section that decides the trainer's precision, and the ``config.json`` of the architecture.

    Raises:
        ValueError: a model on the hub that is not among ``MODELS``.
    """
    section = config.model
    if section.warm_start is not None:
        started = sft.load_config(section.warm_start).model
        section = section.model_copy(update={"path": started.path, "config": started.config})
    if section.config is not None:
        return section, section.config
    local = pathlib.Path(str(section.path)) / "config.json"
    known = MODELS / f"{local.parent.name.lower().replace('-', '_')}.json"
    for file in (local, known):
        if file.is_file():
            return section, str(file)
    names = ", ".join(sorted(path.stem for path in MODELS.glob("*.json")))
    raise ValueError(
        f"model.path={section.path!r} is no folder, and preflight downloads nothing: put its config.json at {known}"
        f" (there are: {names}), or name a file: model.path=null model.config=FILE model.tokenizer={section.path}"
    )


def _make_engine(config: TrainConfig, model: qwen.QwenConfig, meshes: Sequence[Mesh], free: float) -> Engine | None:
    """The engine of a replica with its cache, sized as a run does it; None where not one rollout fits."""
    weights = model.num_params * jnp.dtype(config.sampler.dtype).itemsize
    pages = -(-(config.data.max_prompt_tokens + config.sampler.max_response_tokens) // PAGE_SIZE)
    if config.sampler.kv_memory * (free * meshes[0].size - weights) < pages * _page_bytes(config, model):
        return None
    eos = model.eos_token_id
    stop_ids = eos if isinstance(eos, tuple) else (0 if eos is None else eos,)
    return make_engines(config, model, model.vocab_size, stop_ids, meshes, free)[0]


def _page_bytes(config: TrainConfig, model: qwen.QwenConfig) -> int:
    return kv_cache.page_bytes(model, PAGE_SIZE, cache_dtype(config.sampler, config.model.compute_dtype))
