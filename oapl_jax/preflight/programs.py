"""The programs of a run as preflight compiles them: the run's own assembly, lowered for devices that are only described."""

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
from oapl_jax.build.assembly import Assembly, make_assembly
from oapl_jax.build.checks import CHECKS
from oapl_jax.build.sampler import PAGE_SIZE, kv_shards
from oapl_jax.config import config_file
from oapl_jax.config.commands import SftConfig, TrainConfig
from oapl_jax.distributed.sharding import platform_of, row_shards
from oapl_jax.learner.batch import RowLayout, from_pairs
from oapl_jax.model import splash
from oapl_jax.model.flops import forward_flops, update_flops
from oapl_jax.model.logprob import chunk_tokens
from oapl_jax.model.segments import Segments
from oapl_jax.preflight import kernels
from oapl_jax.sampler.engine import PREFILL_TOKENS

MODELS = config_file.SHIPPED / "models"
"""Architectures of models on the Hugging Face hub, so that preflight needs no network."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program of a run."""

    name: str
    lower: Callable[[], Any]
    """Traces it for its devices; ``.compile()`` of what it returns needs their compiler."""
    mesh: Mesh
    beside: float
    """Bytes of a device that are taken while it runs and are not its arguments."""
    model_flops: float = 0
    """Of the model's mathematics, over all devices: nothing computed twice, attention to visible tokens only."""
    kernel_flops: float = 0
    """The share of attention in them, which is not in the program's text where kernels do it."""
    scalars: Callable[[], kernels.Scalars] = kernels.Scalars
    """What attention kernels are given, in a batch of full length."""
    expected_trips: tuple[float, ...] = ()
    """Of loops whose end only the run knows, the outer ones first."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on given devices."""

    assembly: Assembly
    source: str
    """Where the architecture was read from."""
    programs: tuple[Program, ...]
    """None where the memory is too little before anything is compiled."""


def make_plan(
    config: TrainConfig,
    devices: Sequence[Any],
    usable: float,
    replica_devices: Callable[[int], Sequence[Any] | None] = lambda num_devices: None,
) -> Plan:
    """Builds the programs of a run on devices, real or described ones, with ``usable`` bytes each.

    The tokenizer is not read: all rows of the vocabulary count as in use. For ``replica_devices`` see
    ``make_assembly``.

    Raises:
        ValueError: what the config got wrong; the message names it.
    """
    source = architecture_file(config)
    architecture = policy.read_config(pathlib.Path(source))
    eos = architecture.eos_token_id
    assembly = make_assembly(
        config,
        architecture,
        architecture.vocab_size,
        eos if isinstance(eos, tuple) else (0 if eos is None else eos,),
        devices=devices,
        usable=usable,
        replica_devices=replica_devices,
        may_lack_room=True,
    )
    if not assembly.engines or assembly.account.shortage(usable) > 0:
        return Plan(assembly, source, ())
    return Plan(assembly, source, (*_learner_programs(assembly), *_sampler_programs(assembly)))


def rollout_bytes(assembly: Assembly) -> float:
    """Bytes on each device of a replica that the keys and values of one rollout of full length take."""
    engine, rows = assembly.engines[0], assembly.learner.rows
    page_bytes = engine.cache_bytes / engine.num_pages / kv_shards(assembly.architecture, engine.mesh)
    return -(-rows.max_tokens // PAGE_SIZE) * page_bytes


def _learner_programs(assembly: Assembly) -> list[Program]:
    config, learner, account = assembly.config, assembly.learner, assembly.account
    mesh, rows = learner.mesh, learner.rows
    batch, full = learner.largest_batch(), rows.full
    num_rows = batch.tokens.shape[1]
    num_used = math.ceil(full.rows / num_rows)
    work = assembly.architecture, full.tokens, full.pairs, full.scored
    forward, attention = forward_flops(*work)
    chunk = chunk_tokens(assembly.architecture.vocab_size // mesh.shape["tensor"], platform_of(mesh))
    chunks = math.ceil(full.scored / num_used / row_shards(mesh) / mesh.shape["context"] / chunk)
    micro_batches = (num_used,) if len(batch.tokens) > 1 else ()
    make = functools.partial(Program, mesh=mesh)
    return [
        make(
            "train_step",
            functools.partial(learner.train_step.lower, learner.shapes, batch),
            beside=account.beside_train_step,
            model_flops=update_flops(*work, has_frozen_weights=config.lora.rank > 0),
            kernel_flops=3 * attention,
            expected_trips=(*micro_batches, chunks),
            scalars=functools.partial(splash_scalars, rows),
        ),
        make(
            "score",
            functools.partial(learner.score.lower, learner.shapes.params, batch),
            beside=account.optimizer + account.beside_train_step,
            model_flops=forward,
            kernel_flops=attention,
            expected_trips=(*micro_batches, chunks),
            scalars=functools.partial(splash_scalars, rows),
        ),
    ]


def _sampler_programs(assembly: Assembly) -> list[Program]:
    config, architecture, account = assembly.config, assembly.architecture, assembly.account
    engine, replica_params = assembly.engines[0], assembly.replica_shapes
    beside = account.evaluation_weights + (account.trainer if account.is_colocated else 0)
    length = engine.padded_length(engine.max_prompt_tokens)
    prefill = forward_flops(architecture, length, length * (length + 1) / 2, 1)
    parts = math.ceil(length / PREFILL_TOKENS)
    tokens = engine.num_rows * engine.decode_steps
    # Rows are on average half-way through their response, as far as there are pages.
    visible = min(
        config.data.max_prompt_tokens + config.sampler.max_response_tokens / 2,
        engine.num_pages * PAGE_SIZE / engine.num_rows,
    )
    decode = forward_flops(architecture, tokens, tokens * visible, tokens)
    programs = [
        Program(
            "prefill",
            functools.partial(engine.lower_prefill, replica_params),
            engine.mesh,
            beside=beside + account.kv_cache,
            model_flops=prefill[0],
            kernel_flops=prefill[1],
            expected_trips=(parts,) if parts > 1 else (),
        ),
        Program(
            "decode",
            functools.partial(engine.lower_generate, replica_params),
            engine.mesh,
            beside=beside,
            model_flops=decode[0],
            kernel_flops=decode[1],
            scalars=functools.partial(kernels.Scalars, live_tokens=visible),
            expected_trips=(engine.decode_steps,),
        ),
    ]
    copy = assembly.sync.program(assembly.learner.shapes.params)
    if copy is not None:
        # The sampler has its old weights until the new ones are complete.
        taken = account.optimizer + account.beside_train_step
        lower = functools.partial(copy[0].lower, copy[1])
        programs.append(Program("sync", lower, assembly.trainer_mesh, taken))
    return programs


def splash_scalars(rows: RowLayout) -> kernels.Scalars:
    """The tables of splash attention for the first row of a batch of full length, on the device with its last tokens."""
    prompt, response = (
        np.zeros(n, np.int32) for n in (rows.max_tokens - rows.max_response_tokens, rows.max_response_tokens)
    )
    batch = from_pairs([(prompt, response)] * rows.num_rollouts, rows)
    ids = batch.segment_ids if rows.row_tokens else np.ones_like(batch.tokens)
    keys = Segments(jnp.asarray(ids[0]), None if batch.prompt_ids is None else jnp.asarray(batch.prompt_ids[0]))
    total = batch.tokens.shape[1]
    num_queries = total // (1 if rows.mesh is None else rows.mesh.shape["context"])
    size = splash.block_size(num_queries, total, shares_prompts=keys.prompts is not None)
    if size % splash.LANES:
        return kernels.Scalars()
    start = total - num_queries
    queries = jax.tree.map(lambda ids: ids[start:], keys)
    by_query, by_key = (
        [np.asarray(table) for table in (info.data_next, info.block_mask, info.mask_next) if table is not None]
        for info in splash.find_blocks(queries, keys, start, size)
    )
    return kernels.Scalars({f"splash_mha_{name}": by_query for name in ("fwd", "dq")} | {"splash_mha_dkv": by_key})


def architecture_file(config: TrainConfig) -> str:
    """The ``config.json`` of the model's architecture, from its folder or from ``MODELS``.

    Raises:
        ValueError: it is in neither; says what to do.
    """
    section = config.model
    if section.warm_start is not None:
        section = config_file.load(SftConfig, section.warm_start, checks=CHECKS).model
    if section.config is not None:
        return section.config
    local = pathlib.Path(str(section.path)) / "config.json"
    known = MODELS / f"{local.parent.name.lower().replace('-', '_')}.json"
    for file in (local, known):
        if file.is_file():
            return config_file.from_here(file)
    names = ", ".join(sorted(path.stem for path in MODELS.glob("*.json")))
    raise ValueError(
        f"model.path={section.path!r} is no folder, and preflight downloads nothing: put its config.json at"
        f" {config_file.from_here(known)} (there are: {names}), or name a file: model.path=null model.config=FILE model.tokenizer={section.path}"
    )
