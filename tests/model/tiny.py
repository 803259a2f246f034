"""Tiny models with the traits in which Qwen checkpoints differ; weights from a seeded NumPy generator.

Made in NumPy, so that the expectations in ``tests/golden`` need to hold token ids and logits only.
"""

import dataclasses
import functools
import pathlib
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from oapl_jax.model import hf, logprob, qwen

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "qwen_logits.npz"

_BASE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_theta": 1e6,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

_LLAMA = {"model_type": "llama", **_BASE, "rope_theta": 100.0}
# A context so short that the positions of the tests reach kept, mixed and divided frequencies.
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 32}
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 4.0}

HF_CONFIGS: dict[str, dict[str, Any]] = {
    # qkv bias, no qk-norm; head_dim = D/H is implied
    "qwen2_untied": {"model_type": "qwen2", **_BASE},
    "qwen2_tied": {"model_type": "qwen2", **_BASE, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "qwen2_theta_1e4": {"model_type": "qwen2", **_BASE, "rope_theta": 1e4},
    # qk-norm, no bias; head_dim = D/H
    "qwen3_tied": {"model_type": "qwen3", **_BASE, "head_dim": 8, "tie_word_embeddings": True},
    # head_dim != D/H
    "qwen3_wide_heads": {"model_type": "qwen3", **_BASE, "head_dim": 16, "rope_theta": 5e6},
    "qwen3_one_kv_head": {"model_type": "qwen3", **_BASE, "head_dim": 16, "num_key_value_heads": 1},
    "qwen3_eps_1e5": {"model_type": "qwen3", **_BASE, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e4},
    # more rows in the embedding than any tokenizer has ids
    "qwen3_padded_vocabulary": {"model_type": "qwen3", **_BASE, "head_dim": 8, "vocab_size": 64},
    # neither bias nor qk-norm
    "llama_tied": {"model_type": "llama", **_BASE, "tie_word_embeddings": True, "rope_theta": 1e4},
    "llama_linear": {**_LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama_llama3": {**_LLAMA, "rope_scaling": _LLAMA3},
    "qwen2_yarn": {"model_type": "qwen2", **_BASE, "rope_scaling": _YARN},
    "moe": {"model_type": "qwen3_moe", **_BASE, "head_dim": 8, **_EXPERTS, "norm_topk_prob": True},
    "moe_raw_weights": {"model_type": "qwen3_moe", **_BASE, "head_dim": 8, **_EXPERTS, "norm_topk_prob": False},
}


def config(name: str, **changes: Any) -> qwen.QwenConfig:
    return dataclasses.replace(qwen.QwenConfig.from_hf(HF_CONFIGS[name]), **changes)


def weights(name: str) -> dict[str, np.ndarray]:
    """Weights by their Hugging Face name, far enough from 0 and 1 that a missing one shows."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    tensors = {}
    for tensor, layout, shape, _ in hf._all_tensors(config(name), qwen.abstract(config(name))[1]):
        values = rng.normal(size=layout.hf_shape(shape)).astype(np.float32)
        tensors[tensor] = 1 + 0.3 * values if "norm" in tensor else 0.2 * values
    return tensors


def tokens(name: str) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(name.encode()) + 1).integers(0, 48, (2, 11), dtype=np.int32)


def rows(batch: int, length: int, seed: int = 0) -> jax.Array:
    """Random token ids ``[batch, length]``."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, 48, (batch, length), dtype=np.int32))


def positions(token_ids: Any) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(token_ids.shape[1]), token_ids.shape)


@functools.cache
def split(model_config: qwen.QwenConfig) -> tuple[Any, Any]:
    """``nnx.split`` of a model with weights far enough from 0 and 1 that mistakes show.

    Made in NumPy: compiling jax's random bits for every shape would take seconds per model.
    """
    graphdef, params = qwen.abstract(model_config)
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.normal(size=leaf.shape)
        return jnp.asarray(1 + 0.3 * values if "norm" in jax.tree_util.keystr(path) else 0.2 * values, leaf.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(draw, params)


def scopes(lowered: jax.stages.Lowered) -> set[str]:
    """The names of ``jax.named_scope`` in a program once it is compiled, among others."""
    option = "jax_compilation_cache_include_metadata_in_key"  # else a cache has the names of former code
    before = getattr(jax.config, option)
    jax.config.update(option, True)
    try:
        text = lowered.compile().as_text()
    finally:
        jax.config.update(option, before)
    return {part for name in re.findall(r'op_name="([^"]*)"', text) for part in re.split(r"[/()]", name)}


@functools.partial(jax.jit, static_argnums=0)
def logits(graphdef: Any, params: Any, token_ids: Any) -> jax.Array:
    model = nnx.merge(graphdef, params)
    return model.logits(model.hidden(token_ids, positions(token_ids))[0])


# Under jit, as everybody calls it; arrays are arguments, so that rows of one shape share a program.
sequence_logprobs = jax.jit(logprob.sequence_logprobs, static_argnums=0, static_argnames=("temperature", "vocab_size"))
