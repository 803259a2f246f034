"""int8 weights and cache: the error of each number, and models of them against models of floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import tiny
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed.sharding import make_meshes
from oapl_jax.learner.batch import RowLayout, from_pairs
from oapl_jax.model.quantized import Int8, dequantize, quantize, quantize_weights
from oapl_jax.rollouts import sampling
from oapl_jax.rollouts.sampling import Request
from oapl_jax.sampler.engine import Engine
from oapl_jax.sampler.sampler import JaxSampler

OUTPUT_CHANNELS = {
    "embedding": (0,),
    "lm_head": (1,),
    "layers/attention/query": (0, 2, 3),
    "layers/attention/key": (0, 2, 3),
    "layers/attention/value": (0, 2, 3),
    "layers/attention/output": (0, 3),
}
MLP, EXPERTS = (0, 2), (0, 1, 3)
"""Dimensions of each matrix that its product keeps."""


def as_floats(tree):
    return jax.tree.map(lambda leaf: dequantize(leaf, jnp.float32), tree, is_leaf=lambda leaf: isinstance(leaf, Int8))


def by_name(params):
    leaves = jax.tree.leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.get_value() for path, leaf in leaves}


@pytest.mark.parametrize("name", ["qwen2_untied", "moe"])
def test_each_output_channel_of_each_matrix_is_rounded_to_its_own_scale(name):
    params = tiny.split(tiny.config(name))[1]
    floats, quantized = by_name(params), by_name(jax.jit(quantize_weights)(params))
    for parameter, value in quantized.items():
        weight = np.asarray(floats[parameter])
        if not isinstance(value, Int8):
            assert any(word in parameter for word in ("norm", "bias", "router")), parameter
            np.testing.assert_array_equal(value, weight)
            continue
        is_mlp = parameter.split("/")[-1] in ("gate", "up", "down")
        kept = (EXPERTS if name == "moe" else MLP) if is_mlp else OUTPUT_CHANNELS[parameter]
        summed = tuple(i for i in range(weight.ndim) if i not in kept)
        scale = np.abs(weight).max(axis=summed, keepdims=True) / 127
        np.testing.assert_allclose(value.scale, scale, rtol=1e-6)
        assert value.values.dtype == jnp.int8
        error = np.abs(weight - np.asarray(value.values, np.float64) * value.scale)
        assert (error <= value.scale / 2 * (1 + 1e-4)).all()
    assert sum(isinstance(value, Int8) for value in quantized.values()) == 9


def test_a_channel_of_zeros_stays_zero_and_a_nan_is_not_hidden():
    numbers = jnp.array([[0.0, 0.0, 0.0], [1.0, jnp.nan, 2.0], [-4.0, 1.0, 0.5]])
    found = dequantize(quantize(numbers, (1,)), jnp.float32)
    np.testing.assert_array_equal(found[0], 0)
    assert np.isnan(found[1]).any()
    np.testing.assert_allclose(found[2], numbers[2], atol=2 / 127)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_untied", "qwen3_tied", "moe"])
def test_logits_are_those_of_the_rounded_weights(name):
    graphdef, params = tiny.split(tiny.config(name))
    tokens = tiny.rows(2, 5)
    quantized = jax.jit(quantize_weights)(params)
    logits = tiny.logits(graphdef, quantized, tokens)
    np.testing.assert_allclose(logits, tiny.logits(graphdef, as_floats(quantized), tokens), atol=1e-5)
    assert np.abs(logits - tiny.logits(graphdef, params, tokens)).max() > 1e-3, "the rounding shows"


def sample(graphdef, params, config, **options):
    """``(prompt, rollouts)`` of a tiny model."""
    engine = Engine(
        graphdef,
        config,
        vocab_size=48,
        stop_ids=(1,),
        num_rows=4,
        max_prompt_tokens=8,
        max_response_tokens=6,
        decode_steps=3,
        page_size=4,
        mesh=make_meshes(MeshConfig(trainer="tensor=1"))[0],
        **options,
    )
    prompts = [np.array([3, 4, 5, 6, 7], np.int32), np.array([9], np.int32)]
    requests = [Request(i, prompt, 2, (7, 0, i)) for i, prompt in enumerate(prompts)]
    sampler = JaxSampler([engine], engine.mesh)
    sampler.set_weights(params)
    done = dict(sampling.run(sampler, requests))
    return [(prompt, rollout) for i, prompt in enumerate(prompts) for rollout in done[i]]


def differences(graphdef, params, rollouts):
    """The sampler's log-probabilities minus those of a model of floats."""
    batch = from_pairs([(prompt, r.token_ids) for prompt, r in rollouts], RowLayout(len(rollouts), 14))
    tokens, mask = jnp.asarray(batch.tokens), jnp.asarray(batch.response_mask)
    expected = tiny.sequence_logprobs(graphdef, params, tokens, mask, temperature=1.0, vocab_size=48)[0]
    return np.concatenate([r.logprobs for _, r in rollouts]) - np.asarray(expected)[batch.response_mask]


@pytest.mark.slow
def test_the_samplers_logprobs_are_those_of_the_rounded_weights():
    config = tiny.config("qwen3_tied")
    graphdef, params = tiny.split(config)
    quantized = jax.jit(quantize_weights)(params)
    rollouts = sample(graphdef, quantized, config)
    assert np.abs(differences(graphdef, as_floats(quantized), rollouts)).max() < 1e-5
    assert np.abs(differences(graphdef, params, rollouts)).max() > 1e-3, "not those of the floats"


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["dense", "xla"])
def test_an_int8_cache_changes_the_logprobs_a_little(attention):
    config = tiny.config("qwen3_tied")
    graphdef, params = tiny.split(config)
    rollouts = sample(graphdef, params, config, cache_dtype=jnp.int8, attention=attention)
    difference = np.abs(differences(graphdef, params, rollouts))
    assert 1e-6 < difference.max() < 0.1
