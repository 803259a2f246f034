"""Random schedules against a reference that knows nothing of rows, pages, chunks or mates."""

import contextlib
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from oapl_jax.rollouts.sampling import Request
from oapl_jax.sampler.page_pool import PagePool
from oapl_jax.sampler.scheduler import Scheduler
from oapl_jax.types import FinishReason
from test_engine import GRAPHDEF, MAX_PROMPT, MAX_RESPONSE, PARAMS, PROMPTS, STOPS, VOCAB, make_engine, run

MOST_ROLLOUTS, NUM_SEEDS = 6, 3


@functools.cache
def reference():
    """Tokens and log-probabilities of every rollout that a schedule may ask for, by (prompt, seed, rollout).

    The whole row goes through the model for each token, and the draw inverts the distribution function.
    """
    keys = [(p, s, g) for p in range(len(PROMPTS)) for s in range(NUM_SEEDS) for g in range(MOST_ROLLOUTS)]
    rows = np.zeros((len(keys), MAX_PROMPT + MAX_RESPONSE), np.int32)
    lengths = np.array([len(PROMPTS[p]) for p, _, _ in keys])
    for row, (p, _, _) in zip(rows, keys, strict=True):
        row[: len(PROMPTS[p])] = PROMPTS[p]

    @jax.jit
    def distribution(rows, last):
        model = nnx.merge(GRAPHDEF, PARAMS)
        hidden, _ = model.hidden(rows, jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape))
        logits = model.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1))[:, 0, :VOCAB]
        return jax.nn.log_softmax(logits)

    @jax.jit
    @jax.vmap
    def uniforms(seed, rollout, position):
        key = jax.random.key(7)
        for value in (0, seed, rollout, position):
            key = jax.random.fold_in(key, value)
        return ((jax.random.bits(key, (2,)) >> 9).astype(jnp.float32) + 0.5) * 2.0**-23

    seeds, rollouts = np.array([s for _, s, _ in keys]), np.array([g for _, _, g in keys])
    tokens, logprobs = [], []
    for step in range(MAX_RESPONSE):
        logs = np.asarray(distribution(rows, lengths + step - 1), np.float64)
        block, within = np.asarray(uniforms(seeds, rollouts, lengths + step), np.float64).T
        # The vocabulary is smaller than the number of blocks: a block is one token, and holds all of its mass.
        del within
        drawn = np.array([np.searchsorted(np.cumsum(np.exp(row)), u) for row, u in zip(logs, block, strict=True)])
        tokens.append(drawn)
        logprobs.append(logs[np.arange(len(keys)), drawn])
        rows[np.arange(len(keys)), lengths + step] = drawn
    return {
        key: (ids, values) for key, ids, values in zip(keys, np.stack(tokens, 1), np.stack(logprobs, 1), strict=True)
    }


def expected(prompt, seed, rollout, limit):
    ids, logprobs = reference()[prompt, seed, rollout]
    stops = np.flatnonzero(np.isin(ids, STOPS))
    length = min([limit, *(stops[:1] + 1)])
    reason = FinishReason.STOP if ids[length - 1] in STOPS else FinishReason.LENGTH
    return ids[:length], logprobs[:length], reason


requests = st.tuples(
    st.integers(0, len(PROMPTS) - 1),
    st.integers(0, NUM_SEEDS - 1),
    st.lists(st.integers(1, MAX_RESPONSE), min_size=1, max_size=MOST_ROLLOUTS),
    st.one_of(st.none(), st.floats(1, 12)),
)
actions = st.lists(st.one_of(requests, requests, st.just("step"), st.just("step"), st.just("abort")), max_size=14)
shapes = st.sampled_from([{}, {"num_pages": 9}, {"num_pages": 13}])
modes = st.sampled_from([{}, {"chunks_ahead": 1}])


@pytest.mark.slow
@hypothesis.given(shapes, modes, actions)
@hypothesis.settings(max_examples=120, deadline=None, derandomize=True, database=None)
def test_every_rollout_is_returned_once_and_right_and_every_page_is_freed(shape, mode, schedule):
    check_schedule(shape, mode, schedule)


@pytest.mark.slow
@pytest.mark.long
@hypothesis.given(shapes, modes, actions)
@hypothesis.settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@pytest.mark.timeout(1800)  # ten times what it takes on an idle machine
def test_the_same_holds_in_a_thousand_schedules(shape, mode, schedule):
    check_schedule(shape, mode, schedule)


def check_schedule(shape, mode, schedule):
    engine = make_engine(num_rows=4, decode_steps=3, **shape)
    scheduler = Scheduler(engine, contextlib.nullcontext(), **mode)
    asked, returned, aborted = {}, {}, set()
    for action in schedule:
        if action == "step":
            finished = scheduler.step(PARAMS)
            assert not {tag for tag, _ in finished} & returned.keys(), "a group came twice"
            returned |= dict(finished)
        elif action == "abort":
            scheduler.abort()
            aborted |= asked.keys() - returned.keys()
        else:
            prompt, seed, limits, likely = action
            tag = len(asked)
            asked[tag] = action
            options = {"max_tokens": tuple(limits), "expected_tokens": likely}
            scheduler.submit(Request(tag, PROMPTS[prompt], len(limits), (7, 0, seed), **options))
    rest = run(scheduler, [])
    assert not rest.keys() & returned.keys(), "a group came twice"
    returned |= rest
    assert returned.keys() == asked.keys() - aborted
    for tag, rollouts in returned.items():
        prompt, seed, limits, _ = asked[tag]
        assert len(rollouts) == len(limits)
        for g, (rollout, limit) in enumerate(zip(rollouts, limits, strict=True)):
            ids, logprobs, reason = expected(prompt, seed, g, limit)
            np.testing.assert_array_equal(rollout.token_ids, ids)
            np.testing.assert_allclose(rollout.logprobs, logprobs, atol=1e-5)
            assert rollout.finish_reason is reason
    assert scheduler._pool.num_free == engine.num_pages
    assert scheduler.is_idle


def test_pages_are_free_again_when_the_last_holder_lets_go():
    pool = PagePool(3)
    pages = pool.take(2)
    pool.share(pages[:1])
    pool.release(pages)
    assert pool.num_free == 2
    pool.release(pages[:1])
    assert pool.num_free == 3
    with pytest.raises(ValueError, match="4 pages asked for, 3 of 3 are free"):
        pool.take(4)
    with pytest.raises(ValueError, match="released more often than it was taken"):
        pool.release(pages[:1])
    with pytest.raises(ValueError, match="no holder to share with"):
        pool.share(pages[:1])
