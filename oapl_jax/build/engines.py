"""The engines of a mesh: one for each replica, with a cache sized by the memory that is left."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from oapl_jax.config.sampling import EvaluateSamplerConfig, SamplerConfig
from oapl_jax.model import qwen
from oapl_jax.sampler import kv_cache
from oapl_jax.sampler.engine import Engine, joins_layers
from oapl_jax.sampler.replicas import free_bytes

PAGE_SIZE = 16
"""Tokens of a page of the cache."""


def make_replica_engines(
    sampler: SamplerConfig | EvaluateSamplerConfig,
    model: qwen.QwenConfig,
    meshes: Sequence[Mesh],
    *,
    num_rows: int,
    compute_dtype: DTypeLike,
    vocab_size: int,
    stop_ids: Sequence[int],
    max_prompt_tokens: int,
    can_truncate: bool,
    device_free: float | None = None,
) -> tuple[Engine, ...]:
    """An engine for each replica.

    Args:
        sampler: precisions, limit of a response, memory of the cache.
        model: the policy's architecture.
        meshes: of the replicas, which divide the rows.
        num_rows: sequences decoded at once, over all replicas.
        compute_dtype: of products where ``sampler.dtype`` is int8.
        vocab_size: the tokenizer's length.
        stop_ids: tokens that end a response.
        max_prompt_tokens: limit of a prompt.
        can_truncate: whether top-k, top-p or min-p may be asked for.
        device_free: bytes that weights and cache find free on each device; None: ask the devices.

    Raises:
        ValueError: the memory has no room for one sequence.
    """
    rows, cached = num_rows // len(meshes), cache_dtype(sampler, compute_dtype)
    graphdef = qwen.abstract(model, compute_dtype=_compute_dtype(sampler, compute_dtype))[0]
    max_pages = -(-(max_prompt_tokens + sampler.max_response_tokens) // PAGE_SIZE)
    # A replica's own weights are not there yet when the engines are made.
    weights = model.num_params * jnp.dtype(sampler.dtype).itemsize * (2 if joins_layers(meshes[0]) else 1)
    free = free_bytes(meshes[0]) if device_free is None else device_free * meshes[0].size
    affordable = int(sampler.kv_memory * max(0, free - weights) // kv_cache.page_bytes(model, PAGE_SIZE, cached))
    return tuple(
        Engine(
            graphdef,
            model,
            vocab_size=vocab_size,
            stop_ids=stop_ids,
            num_rows=rows,
            max_prompt_tokens=max_prompt_tokens,
            max_response_tokens=sampler.max_response_tokens,
            decode_steps=sampler.decode_steps,
            mesh=mesh,
            num_pages=min(rows * max_pages, affordable),
            page_size=PAGE_SIZE,
            cache_dtype=cached,
            can_truncate=can_truncate,
        )
        for mesh in meshes
    )


def cache_dtype(sampler: SamplerConfig | EvaluateSamplerConfig, compute_dtype: DTypeLike) -> jnp.dtype:
    """Precision of keys and values."""
    return jnp.dtype(sampler.kv_dtype or _compute_dtype(sampler, compute_dtype))


def _compute_dtype(sampler: SamplerConfig | EvaluateSamplerConfig, compute_dtype: DTypeLike) -> DTypeLike:
    return compute_dtype if sampler.dtype == "int8" else sampler.dtype
