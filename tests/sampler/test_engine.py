"""The sampler against the learner and against itself: exact log-probabilities, keys, stops, limits."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from oapl_jax.config import MeshConfig
from oapl_jax.learner.batch import from_pairs
from oapl_jax.model import qwen
from oapl_jax.model.logprob import sequence_logprobs
from oapl_jax.sampler.engine import Engine
from oapl_jax.sampler.sampling import SamplingParams
from oapl_jax.sampler.scheduler import Request, Scheduler
from oapl_jax.sharding import SAMPLER_RULES, make_meshes, reshard, shardings
from oapl_jax.types import FinishReason

VOCAB, PADDED_VOCAB, STOPS = 29, 32, (1, 5)
MAX_PROMPT, MAX_RESPONSE = 20, 12
CONFIG = qwen.QwenConfig.from_hf(
    {
        "model_type": "qwen3",
        "vocab_size": PADDED_VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        "rope_theta": 1e4,
    }
)
GRAPHDEF, PARAMS = nnx.split(qwen.Qwen(CONFIG, rngs=nnx.Rngs(0)))
PROMPTS = [
    np.random.default_rng(i).integers(2, VOCAB, size).astype(np.int32) for i, size in enumerate([1, 7, 16, 20, 3])
]


LAW = SamplingParams(VOCAB)


@functools.cache
def make_engine(sampling=LAW, num_rows=8, decode_steps=4, sampler_mesh="tensor=1", stop_ids=STOPS):
    return Engine(
        GRAPHDEF,
        CONFIG,
        sampling,
        stop_ids=stop_ids,
        num_rows=num_rows,
        max_prompt_tokens=MAX_PROMPT,
        max_response_tokens=MAX_RESPONSE,
        decode_steps=decode_steps,
        mesh=make_meshes(MeshConfig(trainer=sampler_mesh))[0],
    )


def sample(engine, prompts=PROMPTS, num_rollouts=4, seed=7, order=None, params=PARAMS):
    requests = [Request(i, p, num_rollouts, (seed, 0, i)) for i, p in enumerate(prompts)]
    if order is not None:
        requests = [requests[i] for i in order]
    done = dict(Scheduler(engine, contextlib.nullcontext()).run(params, requests))
    return [done[i] for i in sorted(done)]


def learner_logprobs(prompt, rollouts, temperature=1.0):
    batch = from_pairs(
        [(prompt, r.token_ids) for r in rollouts], num_rows=len(rollouts), max_tokens=MAX_PROMPT + MAX_RESPONSE
    )
    logprobs, _ = sequence_logprobs(
        GRAPHDEF,
        PARAMS,
        jnp.asarray(batch.tokens),
        jnp.asarray(batch.response_mask),
        temperature=temperature,
        vocab_size=VOCAB,
    )
    return [np.asarray(row)[mask] for row, mask in zip(logprobs, batch.response_mask, strict=True)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_the_learners_up_to_and_including_the_stop_token(temperature):
    groups = sample(make_engine(SamplingParams(VOCAB, temperature)))
    reasons = set()
    for prompt, rollouts in zip(PROMPTS, groups, strict=True):
        for rollout, expected in zip(rollouts, learner_logprobs(prompt, rollouts, temperature), strict=True):
            assert rollout.logprobs.shape == rollout.token_ids.shape
            np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-5)
            reasons.add(rollout.finish_reason)
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}, "the test must have seen both ends"


def test_responses_end_at_the_first_stop_token_or_at_the_limit():
    rollouts = [r for group in sample(make_engine()) for r in group]
    for rollout in rollouts:
        is_stop = np.isin(rollout.token_ids, STOPS)
        assert not is_stop[:-1].any()
        assert (rollout.finish_reason is FinishReason.STOP) == is_stop[-1]
        assert is_stop[-1] or len(rollout.token_ids) == MAX_RESPONSE
    assert {r.token_ids[-1] for r in rollouts if r.finish_reason is FinishReason.STOP} == set(STOPS)


def test_ids_beyond_the_tokenizer_are_never_drawn():
    """The padding rows of the embedding are made the likeliest by far."""
    params = jax.tree.map(lambda x: x, PARAMS)
    params["embedding"].value = params["embedding"].value.at[VOCAB:].mul(50.0)
    raw = nnx.merge(GRAPHDEF, params)
    hidden, _ = raw.hidden(jnp.asarray(PROMPTS[1][None]), jnp.arange(7)[None])
    assert jax.nn.softmax(raw.logits(hidden))[..., VOCAB:].max() > 0.9
    assert max(r.token_ids.max() for group in sample(make_engine(), params=params) for r in group) < VOCAB


def same(first, second):
    return all(
        np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.logprobs, b.logprobs)
        for x, y in zip(first, second, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_same_seed_repeats_bit_for_bit_whatever_the_order_rows_and_mates():
    reference = sample(make_engine())
    assert same(reference, sample(make_engine()))
    assert same(reference, sample(make_engine(), order=[3, 1, 4, 0, 2]))
    assert same(reference[2:3], [sample(make_engine(), order=[2])[0]])
    assert same(reference, sample(make_engine(decode_steps=1)))


def test_same_tokens_for_other_numbers_of_rows():
    for num_rows in (4, 24):
        for group, other in zip(sample(make_engine()), sample(make_engine(num_rows=num_rows)), strict=True):
            for rollout, expected in zip(other, group, strict=True):
                np.testing.assert_array_equal(rollout.token_ids, expected.token_ids)
                np.testing.assert_allclose(rollout.logprobs, expected.logprobs, atol=1e-5)


def test_another_seed_another_group_and_another_rollout_draw_differently():
    first, second = sample(make_engine(), prompts=[PROMPTS[1]] * 2)
    assert not same([first], [second]), "two groups of one prompt"
    assert not same([first], sample(make_engine(), prompts=[PROMPTS[1]], seed=8)), "two seeds"
    assert len({tuple(r.token_ids) for r in first}) > 1, "rollouts of one group"


@pytest.mark.parametrize("mesh", ["tensor=2", "data=4,tensor=2", "data=8"])
def test_a_sharded_sampler_draws_the_same_tokens(mesh):
    engine = make_engine(sampler_mesh=mesh)
    params = reshard(PARAMS, shardings(qwen.abstract(CONFIG)[1], engine.mesh, SAMPLER_RULES))
    for group, other in zip(sample(make_engine()), sample(engine, params=params), strict=True):
        for rollout, expected in zip(other, group, strict=True):
            np.testing.assert_array_equal(rollout.token_ids, expected.token_ids)
            np.testing.assert_allclose(rollout.logprobs, expected.logprobs, atol=1e-5)


def test_generate_stops_early_when_all_rows_are_done():
    """With every id a stop, the token that insert draws is the last and no step may run."""
    engine = make_engine(stop_ids=tuple(range(VOCAB)))
    rollouts = sample(engine, prompts=PROMPTS[:1])[0]
    assert [len(r.token_ids) for r in rollouts] == [1] * 4
    np.testing.assert_allclose(
        np.concatenate([r.logprobs for r in rollouts]),
        np.concatenate(learner_logprobs(PROMPTS[0], rollouts)),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [(np.zeros(0, np.int32), "prompt of 0 tokens"), (np.zeros(21, np.int32), "prompt of 21 tokens")],
)
def test_empty_and_overlong_prompts_are_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        sample(make_engine(), prompts=[prompt])


def test_a_group_larger_than_the_engine_is_refused():
    with pytest.raises(ValueError, match="9 rollouts asked for, 8 of 8 rows are free"):
        sample(make_engine(), num_rollouts=9)


def test_stop_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"stop ids \[1, 30\]"):
        make_engine(stop_ids=(1, 30))


def test_abort_drops_what_is_in_flight_and_frees_every_row():
    scheduler = Scheduler(make_engine(), contextlib.nullcontext())
    scheduler.admit(PARAMS, Request("dropped", PROMPTS[1], 8, (0, 0, 0)))
    scheduler.step(PARAMS)
    scheduler.abort()
    assert scheduler.is_idle
    assert scheduler.has_room(8)
    assert [tag for tag, _ in scheduler.run(PARAMS, [Request("kept", PROMPTS[1], 8, (0, 0, 0))])] == ["kept"]
