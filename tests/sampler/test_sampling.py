"""The processed distribution against a transcription in NumPy, and the draws against the distribution."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.sampler.draw import Distributions, _cut, _pick, _to_blocks, draw, uniforms

COMBINATIONS = [
    SamplingDistribution(temperature, top_k, top_p, min_p)
    for temperature, top_k, top_p, min_p in itertools.product(
        (0.3, 1.0, 1.7), (0, 1, 7, 200, 10**6), (1.0, 0.95, 0.3, 1e-6), (0.0, 0.2, 1.0)
    )
]

SIZES = {
    "whole blocks": (640, 640),
    "padding ids": (640, 601),
    "not whole blocks": (1000, 1000),
    "not whole blocks, padding ids": (999, 401),
    "fewer ids than blocks": (7, 5),
}


def distribution_of(params):
    columns = zip(*[(p.temperature, p.top_k, p.top_p, p.min_p) for p in params], strict=True)
    dtypes = (np.float32, np.int32, np.float32, np.float32)
    return Distributions(*[jnp.asarray(np.array(column, dtype)) for column, dtype in zip(columns, dtypes, strict=True)])


def exact_distribution(logits, params, vocab_size):
    """Probabilities of all ids, float64; temperature 0 is the plain distribution at temperature 1."""
    if params.temperature == 0:
        params = SamplingDistribution()
    scaled = logits[:vocab_size].astype(np.float64) / params.temperature

    def normalised(kept):
        weights = np.where(kept, np.exp(scaled - scaled.max()), 0)
        return weights / weights.sum()

    descending = np.sort(scaled)[::-1]
    kept = np.full(vocab_size, True)
    if params.top_k:
        kept &= scaled >= descending[min(params.top_k, vocab_size) - 1]
    if params.top_p < 1:
        mass = np.cumsum(np.sort(normalised(kept))[::-1])
        kept &= scaled >= descending[np.searchsorted(mass, params.top_p)]
    probs = normalised(kept)
    return np.concatenate(
        [normalised(kept & (probs >= params.min_p * probs.max())), np.zeros(len(logits) - vocab_size)]
    )


@functools.partial(jax.jit, static_argnames=("vocab_size", "is_sharded"))
def jitted(keys, positions, logits, distribution, **options):
    return draw(uniforms(keys, positions), logits.T, distribution, **options)


def draw_rows(logits, params, seed=0, **options):
    """One draw a row, all numbers in NumPy."""
    keys = jax.random.split(jax.random.key(seed), len(logits))
    drawn = jitted(keys, jnp.arange(len(logits)), jnp.asarray(logits), distribution_of(params), **options)
    return jax.tree.map(np.asarray, drawn)


@functools.partial(jax.jit, static_argnames="vocab_size")
def cuts(logits, distribution, *, vocab_size):
    """The lowest logit that each row keeps."""
    blocks = _to_blocks(logits.T, vocab_size)
    inverse_temperature = 1 / jnp.where(distribution.temperature == 0, 1, distribution.temperature)
    return _cut(blocks, jnp.max(blocks, axis=1), inverse_temperature, distribution, can_truncate=True)


def check_rows(logits, params, vocab_size, atol=2e-6):
    """The distribution of each row, computed from its logits and its cut, and a few draws from it."""
    lowest = np.asarray(cuts(jnp.asarray(logits), distribution_of(params), vocab_size=vocab_size))
    draws = [draw_rows(logits, params, seed, vocab_size=vocab_size) for seed in range(4)]
    for row, (row_logits, row_params) in enumerate(zip(logits, params, strict=True)):
        exact = exact_distribution(row_logits, row_params, vocab_size)
        is_kept = (row_logits >= lowest[row]) & (np.arange(len(row_logits)) < vocab_size)
        scaled = row_logits.astype(np.float64) / (row_params.temperature or 1)
        probs = np.where(is_kept, np.exp(scaled - scaled[is_kept].max()), 0)
        probs /= probs.sum()
        np.testing.assert_array_equal(probs > 0, exact > 0, err_msg=str(row_params))
        np.testing.assert_allclose(probs, exact, atol=atol, rtol=2e-5, err_msg=str(row_params))
        for drawn in draws:
            token = drawn.token[row]
            if row_params.temperature == 0:
                assert token == np.argmax(row_logits[:vocab_size])
                assert np.isnan(drawn.logprob[row])
            else:
                assert exact[token] > 0, row_params
                np.testing.assert_allclose(drawn.logprob[row], np.log(exact[token]), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("num_ids", "vocab_size"), SIZES.values(), ids=SIZES)
def test_distributions_of_one_batch_equal_the_transcription(num_ids, vocab_size):
    params = [*COMBINATIONS, SamplingDistribution(0, 3, 0.5, 0.1), SamplingDistribution(0)]
    logits = np.random.default_rng(num_ids).normal(1, 3, (len(params), num_ids)).astype(np.float32)
    check_rows(logits, params, vocab_size)


@pytest.mark.slow
def test_ties_with_the_last_kept_token_are_kept():
    logits = np.random.default_rng(1).normal(0, 3, (len(COMBINATIONS), 640)).round().astype(np.float32)
    check_rows(logits, COMBINATIONS, 601)


def test_of_equally_likely_tokens_a_greedy_draw_takes_the_lowest_id():
    logits = np.random.default_rng(1).integers(-9, 9, (8, 640)).astype(np.float32)
    drawn = draw_rows(logits, [SamplingDistribution(0)] * 8, vocab_size=601)
    np.testing.assert_array_equal(drawn.token, np.argmax(logits[:, :601], axis=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fill",
    [
        lambda rows: np.where(rows > 4, rows, -1e9),
        lambda rows: rows * 1e4,
        lambda rows: np.sign(rows) * np.exp(12 * np.abs(rows)).clip(0, 1e37),
        lambda rows: np.where(np.arange(rows.shape[1]) == 17, -1e9, 0 * rows - 2e9),
        lambda rows: np.zeros_like(rows),
        lambda rows: np.where(rows > 0, 0.0, -0.0),
        lambda rows: np.full_like(rows, -1e30),
        lambda rows: 100 + rows * 1e-5,
        lambda rows: rows + 50 * (np.arange(rows.shape[1]) % 2),
    ],
    ids=[
        "masked",
        "wide",
        "exponential",
        "one token",
        "uniform",
        "both zeros",
        "low",
        "narrow",
        "one high in each block",
    ],
)
def test_extreme_logits(fill):
    params = [*COMBINATIONS, SamplingDistribution(0)]
    rows = np.random.default_rng(2).normal(0, 3, (len(params), 256))
    check_rows(fill(rows).astype(np.float32), params, 255)


@pytest.mark.parametrize(
    "params",
    [
        SamplingDistribution(),
        SamplingDistribution(top_p=0.8),
        SamplingDistribution(top_k=9),
        SamplingDistribution(min_p=0.05),
        SamplingDistribution(0.7, 100, 0.9, 0.01),
        SamplingDistribution(1.5, top_p=0.99),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params):
    num_draws, num_ids, vocab_size = 100_000, 160, 150
    logits = np.random.default_rng(3).normal(0, 2, num_ids).astype(np.float32)
    exact = exact_distribution(logits, params, vocab_size)
    rows, distribution = (
        jnp.broadcast_to(logits, (num_draws // 10, num_ids)),
        distribution_of([params] * (num_draws // 10)),
    )
    counts = np.zeros(num_ids)
    for part in range(10):
        keys = jnp.broadcast_to(jax.random.key(part), len(rows))
        tokens = jitted(keys, jnp.arange(len(rows)), rows, distribution, vocab_size=vocab_size).token
        counts += np.bincount(tokens, minlength=num_ids)
    assert counts[exact == 0].sum() == 0
    # Rare tokens together, as the test needs some expected draws in every cell.
    is_rare = num_draws * exact < 10
    observed = [*counts[~is_rare], counts[is_rare].sum()]
    expected = [*exact[~is_rare], exact[is_rare].sum()]
    cells = slice(None) if expected[-1] else slice(-1)
    assert scipy.stats.chisquare(observed[cells], num_draws * np.array(expected[cells])).pvalue > 1e-3


@pytest.mark.slow
def test_a_sample_depends_on_its_key_and_position_only():
    params = [
        SamplingDistribution(),
        SamplingDistribution(top_p=0.9),
        SamplingDistribution(0.5, top_k=40),
        SamplingDistribution(0),
    ] * 8
    logits = jnp.asarray(np.random.default_rng(4).normal(0, 1, (32, 640)).astype(np.float32))
    keys, positions, distribution = jax.random.split(jax.random.key(0), 32), jnp.arange(32) % 5, distribution_of(params)
    together = jitted(keys, positions, logits, distribution, vocab_size=640).token

    order = np.random.default_rng(5).permutation(32)
    arguments = jax.tree.map(lambda x: x[order], (keys, positions, logits, distribution))
    np.testing.assert_array_equal(jitted(*arguments, vocab_size=640).token, together[order])
    for row in range(8):
        alone = jax.tree.map(lambda x, row=row: x[row : row + 1], (keys, positions, logits, distribution))
        assert jitted(*alone, vocab_size=640).token[0] == together[row]

    is_drawn = np.asarray(distribution.temperature) > 0
    one_key, one_distribution = jnp.broadcast_to(keys[0], 32), distribution_of([SamplingDistribution()] * 32)
    one_row = jnp.broadcast_to(logits[0], logits.shape)
    assert len(set(np.asarray(jitted(one_key, jnp.arange(32), one_row, one_distribution, vocab_size=640).token))) > 20
    assert (
        np.mean(
            np.asarray(jitted(keys, positions + 1, logits, distribution, vocab_size=640).token != together)[is_drawn]
        )
        > 0.8
    )


@pytest.mark.slow
def test_draws_in_a_loop():
    params = [SamplingDistribution(0.8, 20, 0.9, 0.01), SamplingDistribution()]
    logits = jnp.asarray(np.random.default_rng(6).normal(0, 2, (2, 640)).astype(np.float32))
    keys, distribution = jax.random.split(jax.random.key(0), 2), distribution_of(params)

    def step(carry):
        i, tokens = carry
        return i + 1, tokens.at[i].set(
            draw(uniforms(keys, jnp.full(2, i)), logits.T, distribution, vocab_size=640).token
        )

    loop = jax.jit(lambda: jax.lax.while_loop(lambda carry: carry[0] < 5, step, (0, jnp.zeros((5, 2), jnp.int32)))[1])
    steps = [jitted(keys, jnp.full(2, i), logits, distribution, vocab_size=640).token for i in range(5)]
    np.testing.assert_array_equal(loop(), np.stack(steps))


@pytest.mark.slow
@pytest.mark.parametrize("num_ids", [4096, 1187 * 16])
def test_a_sharded_vocabulary_draws_the_same_tokens_and_is_not_gathered(num_ids):
    num_rows = 16
    mesh = Mesh(np.array(jax.devices()), ("tensor",))
    params = [
        SamplingDistribution(),
        SamplingDistribution(0.7, 50, 0.9, 0.001),
        SamplingDistribution(0),
        SamplingDistribution(top_p=0.95),
    ] * 4
    logits = np.random.default_rng(7).normal(0, 2, (num_rows, num_ids)).astype(np.float32)
    options = {"vocab_size": num_ids - 30}
    whole = draw_rows(logits, params, **options)

    keys, positions = jax.random.split(jax.random.key(0), num_rows), jnp.arange(num_rows)
    sharded = jax.device_put(logits, NamedSharding(mesh, P(None, "tensor")))
    arguments = jax.device_put((keys, positions, distribution_of(params)), NamedSharding(mesh, P()))
    compiled = jitted.lower(*arguments[:2], sharded, arguments[2], is_sharded=True, **options).compile()
    drawn = compiled(*arguments[:2], sharded, arguments[2])
    np.testing.assert_array_equal(drawn.token, whole.token)
    np.testing.assert_allclose(drawn.logprob, whole.logprob, atol=1e-5)

    moved = re.findall(r"= (.*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", compiled.as_text())
    sizes = [math.prod(map(int, dims.split(","))) for shape, _ in moved for dims in re.findall(r"\[([\d,]+)\]", shape)]
    assert max(sizes) <= num_rows * num_ids / 8


def test_picks_only_what_has_mass():
    masses = jnp.array([[0, 0.5, 0, 0.5, 0]] * 6 + [[0.0] * 5], jnp.float32)
    levels = jnp.array([0, 0.4999, 0.5, 0.9999, 1, 2, 0], jnp.float32)
    np.testing.assert_array_equal(_pick(masses.T, jnp.cumsum(masses.T, axis=0), levels), [1, 1, 3, 3, 3, 3, -1])
    rounded = jnp.broadcast_to(jnp.array([1e-7, 0.5, 0.5000002, 1, 0.9999999], jnp.float32), masses.shape)
    levels = jnp.array([5e-8, 0.4999, 0.5000001, 0.9999, 1, 2, 0], jnp.float32)
    np.testing.assert_array_equal(_pick(masses.T, rounded.T, levels), [1, 1, 3, 3, 3, 3, -1])


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "temperature": [-0.1, 1e-9, math.inf, math.nan],
        "top_k": [-1, 2**31],
        "top_p": [0.0, -0.5, 1.01, math.nan],
        "min_p": [-0.1, 1.5, math.nan],
    }.items(),
)
def test_values_out_of_range_are_refused(field, values):
    for value in values:
        with pytest.raises(ValueError, match=re.escape(f"{field}={value!r} is out of range")):
            SamplingDistribution(**{field: value})
