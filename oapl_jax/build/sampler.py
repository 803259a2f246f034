"""The sampler's programs: an engine for each replica, with a cache sized by the memory that is left."""

import heapq
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from oapl_jax.config.commands import EvaluateConfig, GenerateConfig, TrainConfig
from oapl_jax.config.sampling import EvaluateSamplerConfig, SamplerConfig
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.distributed.memory import usable_bytes
from oapl_jax.distributed.sharding import is_here, platform_of
from oapl_jax.model import qwen
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.rollouts.stops import Stops
from oapl_jax.sampler import kv_cache
from oapl_jax.sampler.engine import Engine, is_large_on_cpu, joins_layers, num_slots
from oapl_jax.sampler.sampler import JaxSampler, replica_meshes

PAGE_SIZE = 16
"""Tokens of a page of the cache."""


class NoRoomError(ValueError):
    """The memory has no room for the keys and values of one rollout."""


def make_engines(
    config: TrainConfig | GenerateConfig | EvaluateConfig,
    model: qwen.QwenConfig,
    mesh: Mesh,
    *,
    vocab_size: int,
    stop_ids: Sequence[int],
    max_prompt_tokens: int,
    free: float,
    others: Sequence[SamplingDistribution] = (),
    prompt_lengths: Sequence[int] = (),
    num_copies: int = 1,
    meshes: Sequence[Mesh] | None = None,
) -> tuple[Engine, ...]:
    """An engine for each replica of the sampler's mesh that this process has.

    ``mesh`` is the whole sampler's; ``meshes`` are the replicas', where the devices are only described. Weights, at most
    ``num_copies`` of them, and cache share ``free`` bytes on each device. ``others`` are sampling distributions that may
    be asked for besides the sampler's own. ``prompt_lengths`` are those of all prompts, where they are known: the cache
    then has no more pages than the longest of them can fill.

    Raises:
        NoRoomError: the memory has no room for one sequence.
        ValueError: the rows do not divide over the replicas, or the model has too few positions.
    """
    sampler = config.sampler
    model.check_positions(max_prompt_tokens + sampler.max_response_tokens)
    num_replicas = mesh.size // mesh.shape["tensor"]
    key, num_rows = _rows(sampler)
    if meshes is None:
        meshes = [replica for replica in replica_meshes(mesh) if is_here(replica)]
    if num_rows % num_replicas:
        raise ValueError(f"{key}: {num_rows} rows do not divide over the {num_replicas} replicas of the sampler's mesh")
    if not meshes:
        return ()
    computed = config.model.compute_dtype if sampler.dtype == "int8" else sampler.dtype
    rows, cached = num_rows // num_replicas, jnp.dtype(sampler.kv_dtype or computed)
    max_pages = -(-(max_prompt_tokens + sampler.max_response_tokens) // PAGE_SIZE)
    num_weights = num_copies * model.num_params + num_prepared(model, meshes[0])
    weights = num_weights * jnp.dtype(sampler.dtype).itemsize
    left = sampler.kv_memory * max(0.0, free * meshes[0].size - weights)
    affordable = int(left // kv_cache.page_bytes(model, PAGE_SIZE, cached))
    if affordable < max_pages:
        raise NoRoomError(
            f"no room for one rollout: {max_prompt_tokens} + {sampler.max_response_tokens} tokens need {max_pages} pages"
            f" of {PAGE_SIZE} tokens, and the memory that is left has {affordable}; shorten the limits, raise"
            " sampler.kv_memory, or split the sampler over more devices"
        )
    num_pages = min(rows * max_pages, affordable)
    if prompt_lengths:
        longest = heapq.nlargest(num_slots(rows), prompt_lengths)  # each once: rollouts share their prompt's pages
        own = num_slots(rows) * (sampler.max_response_tokens // PAGE_SIZE + 2)
        num_pages = max(max_pages, min(num_pages, sum(length // PAGE_SIZE for length in longest) + own))
    return tuple(
        Engine(
            structure(model, replica, computed),
            model,
            vocab_size=vocab_size,
            stop_ids=stop_ids,
            num_rows=rows,
            max_prompt_tokens=max_prompt_tokens,
            max_response_tokens=sampler.max_response_tokens,
            decode_steps=sampler.decode_steps,
            mesh=replica,
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            cache_dtype=cached,
            can_truncate=any(asked.truncates for asked in (SamplingDistribution.of(sampler), *others)),
        )
        for replica in meshes
    )


def structure(model: qwen.QwenConfig, replica: Mesh, compute_dtype: DTypeLike) -> nnx.GraphDef:
    """The structure half of the model that an engine on this replica runs.

    A mixture has the mesh, because its kernels are called for each device's part. XLA splits all other products.
    """
    return qwen.abstract(model, compute_dtype=compute_dtype, mesh=replica if model.num_experts else None)[0]


def make_sampler(
    config: TrainConfig | GenerateConfig | EvaluateConfig,
    architecture: qwen.QwenConfig,
    mesh: Mesh,
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    prompt_lengths: Sequence[int] = (),
    num_copies: int = 1,
) -> JaxSampler:
    """The sampler of a process that only samples: weights and cache have all of its memory; errors as above."""
    engines = make_engines(
        config,
        architecture,
        mesh,
        vocab_size=tokenizer.vocab_size,
        stop_ids=Stops(tokenizer, SamplingDistribution.of(config.sampler)).ids,
        max_prompt_tokens=max_prompt_tokens,
        free=usable_bytes(mesh),
        prompt_lengths=prompt_lengths,
        num_copies=num_copies,
    )
    return JaxSampler(engines, mesh, tokenizer.decode)


def num_prepared(model: qwen.QwenConfig, mesh: Mesh) -> int:
    """Weights that a sampler on this replica has twice: its decode steps read a copy that it has made for itself."""
    is_cpu, embedding = platform_of(mesh) == "cpu", model.vocab_size * model.hidden_size
    has_layers = (is_cpu or joins_layers(mesh)) and not is_large_on_cpu(model, mesh)
    num_matrices = 1 if model.tie_word_embeddings else 2
    head = embedding if is_cpu and num_matrices == 2 else 0
    return head + has_layers * (model.num_params - num_matrices * embedding)


def kv_shards(model: qwen.QwenConfig, mesh: Mesh) -> int:
    """Devices that share a replica's cache; where they do not divide the kv heads, each has all of it."""
    tensor = mesh.shape["tensor"]
    return tensor if model.num_key_value_heads % tensor == 0 else 1


def cache_bytes(engine: Engine) -> float:
    """Bytes of an engine's cache on each of its devices."""
    return engine.cache_bytes / kv_shards(engine.model_config, engine.mesh)


def _rows(sampler: SamplerConfig | EvaluateSamplerConfig) -> tuple[str, int]:
    """Sequences decoded at once, over all replicas, and how the config says it."""
    if isinstance(sampler, EvaluateSamplerConfig):
        return f"sampler.rows={sampler.rows}", sampler.rows
    key = f"sampler.groups_in_flight={sampler.groups_in_flight} x group_size={sampler.group_size}"
    return key, sampler.groups_in_flight * sampler.group_size
