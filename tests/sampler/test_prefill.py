"""Long prompts, which go through the model in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed.sharding import SAMPLER_RULES, make_meshes, reshard, shardings
from oapl_jax.model import qwen
from oapl_jax.sampler import engine as engines
from test_engine import CONFIG, MAX_PROMPT, PARAMS, PROMPTS, make_engine


def prefilled(prompt, engine):
    params = reshard(PARAMS, shardings(qwen.abstract(CONFIG)[1], engine.mesh, SAMPLER_RULES))
    prefix = engine.prefill(engine.prepare(params), prompt)
    return [prefix.logits, *(leaf[:, :, : len(prompt)] for leaf in jax.tree.leaves(prefix.kv))]


@pytest.mark.parametrize(
    ("part_tokens", "sampler_mesh"), [(8, "tensor=1"), (12, "tensor=2")], ids=["divides", "with-padding-sharded"]
)
def test_a_prompt_in_parts_gives_what_it_gives_at_once(monkeypatch, part_tokens, sampler_mesh):
    whole = make_engine()
    assert whole.padded_length(MAX_PROMPT) > part_tokens
    mesh = make_meshes(MeshConfig(trainer=sampler_mesh))[0]
    monkeypatch.setattr(engines, "PREFILL_TOKENS", part_tokens)
    in_parts = make_engine.__wrapped__(mesh=mesh)
    for prompt in PROMPTS:
        for expected, actual in zip(prefilled(prompt, whole), prefilled(prompt, in_parts), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_parts_see_the_rounded_keys_of_an_int8_cache(monkeypatch):
    prompt = PROMPTS[3]
    expected = prefilled(prompt, make_engine(cache_dtype=jnp.int8))[0]
    monkeypatch.setattr(engines, "PREFILL_TOKENS", 8)
    actual = prefilled(prompt, make_engine.__wrapped__(cache_dtype=jnp.int8))[0]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_temporaries_of_a_long_prompt_grow_as_the_prompt_and_not_as_its_square():
    def temporaries(num_tokens):
        mesh = make_meshes(MeshConfig(trainer="tensor=1"))[0]
        engine = engines.Engine(
            qwen.abstract(CONFIG)[0],
            CONFIG,
            vocab_size=29,
            stop_ids=(1,),
            num_rows=1,
            max_prompt_tokens=num_tokens,
            max_response_tokens=16,
            decode_steps=1,
            mesh=mesh,
        )
        return engine.lower_prefill(qwen.abstract(CONFIG)[1]).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16 * 1024) < 4.4 * temporaries(4 * 1024)
