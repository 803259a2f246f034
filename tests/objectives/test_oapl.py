"""The OAPL objective against an independent transcription of the paper, and against its theory."""

import fractions
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oapl_jax.objectives import oapl
from objectives.rows import make_rows

RNG = np.random.default_rng(0)


def losses(logprobs, sampler, mask, advantages, *, beta2):
    rows = make_rows(sampler, mask, advantages)
    return oapl.OBJECTIVE.losses(logprobs, rows, oapl.OaplOptions(beta2=beta2), jnp.float32(1))


def draw(num_rows=6, num_tokens=7):
    mask = np.zeros((num_rows, num_tokens), bool)
    for row, (start, stop) in enumerate(RNG.integers(1, [3, 5], (num_rows, 2))):
        mask[row, start : start + stop] = True
    logprobs = -RNG.exponential(1.0, (num_rows, num_tokens)).astype(np.float32)
    sampler = -RNG.exponential(1.0, (num_rows, num_tokens)).astype(np.float32)
    return logprobs, sampler, mask.astype(np.int32), RNG.normal(size=(num_rows, 1)).astype(np.float32)


def transcription(logprobs, sampler, mask, advantages, beta2):
    """Eq. 3 with loops and float64; returns the mean loss and its gradient in logprobs."""
    total, gradient = 0.0, np.zeros(logprobs.shape)
    for i in range(len(logprobs)):
        log_ratio = sum(float(logprobs[i, t]) - float(sampler[i, t]) for t in range(mask.shape[1]) if mask[i, t])
        residual = beta2 * log_ratio - float(advantages[i, 0])
        total += residual**2
        gradient[i, mask[i] > 0] = 2 * residual * beta2 / len(logprobs)
    return total / len(logprobs), gradient


@pytest.mark.parametrize("beta2", [1e-3, 0.1, 2.0])
def test_loss_and_gradient_equal_the_transcription(beta2):
    logprobs, sampler, mask, advantages = draw()
    loss, gradient = jax.value_and_grad(lambda lp: losses(lp, sampler, mask, advantages, beta2=beta2).mean())(
        jnp.asarray(logprobs)
    )
    expected_loss, expected_gradient = transcription(logprobs, sampler, mask, advantages, beta2)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


def test_value_equals_the_formula_in_exact_arithmetic():
    rewards = np.array([0.0, 1.0, 1.0, 0.25])
    mean = sum(fractions.Fraction(math.exp(r / 0.5)) for r in rewards) / 4
    assert oapl.optimal_value(rewards, 0.5) == pytest.approx(0.5 * math.log(mean), rel=1e-14)


def test_beta1_limits_are_max_and_mean():
    rewards = np.array([0.0, 0.3, 1.0, -2.0])
    assert oapl.optimal_value(rewards, 1e-6) == pytest.approx(rewards.max(), abs=1e-5)
    assert oapl.optimal_value(rewards, 1e9) == pytest.approx(rewards.mean(), abs=1e-8)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_large_rewards_over_beta1_stay_finite_and_exact(scale):
    rewards = np.array([scale, scale - 1.0, 0.0])
    highest = rewards.max()
    expected = highest + math.log(sum(math.exp(r - highest) for r in rewards) / 3)
    assert oapl.optimal_value(rewards, 1.0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("reward", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("beta1", [1e-4, 1.0, 1e4])
def test_all_equal_group_has_zero_advantage_but_still_pulls_to_the_sampler(reward, beta1):
    equal = oapl.OBJECTIVE.advantages(np.full(8, reward), np.ones(8, bool), oapl.OaplOptions(beta1=beta1))
    assert (equal == 0).all()
    gradient = jax.grad(
        lambda lp: losses(lp, jnp.full((1, 2), -1.0), np.ones((1, 2)), jnp.zeros((1, 1)), beta2=0.1).sum()
    )(jnp.full((1, 2), -0.5))
    np.testing.assert_allclose(gradient, 2 * 0.1 * 0.1 * 1.0, rtol=1e-6)


def test_positions_outside_the_mask_do_not_count_even_when_not_finite():
    logprobs, sampler, mask, advantages = draw()
    loss = lambda lp, s: losses(lp, s, mask, advantages, beta2=0.1).mean()  # noqa: E731
    clean = jax.value_and_grad(loss)(jnp.asarray(logprobs), jnp.asarray(sampler))
    dirty = jax.value_and_grad(loss)(jnp.where(mask > 0, logprobs, jnp.nan), jnp.where(mask > 0, sampler, -jnp.inf))
    assert clean[0] == dirty[0]
    np.testing.assert_array_equal(clean[1], dirty[1])


@pytest.mark.parametrize("rewards", [[], [1.0, math.nan], [math.inf, 0.0]])
def test_unusable_rewards_are_refused(rewards):
    with pytest.raises(ValueError, match="finite rewards"):
        oapl.optimal_value(np.array(rewards), 1.0)


def test_minimiser_is_the_kl_regularised_optimum_from_off_policy_data():
    """3-armed bandit: pi* is proportional to pi_s * exp(r / beta), whatever distribution the data came from."""
    rewards, beta = np.array([1.0, 0.2, -0.4]), 0.7
    sampler = np.log([0.1, 0.6, 0.3])
    value = beta * np.log(np.sum(np.exp(sampler + rewards / beta)))
    optimum = sampler + (rewards - value) / beta

    data_distribution = jnp.array([0.5, 0.25, 0.25])  # neither pi nor pi_s
    rows = np.float32(sampler)[:, None], np.ones((3, 1)), np.float32(rewards - value)[:, None]

    def loss(theta):
        return jnp.sum(data_distribution * losses(jax.nn.log_softmax(theta)[:, None], *rows, beta2=beta)[:, 0])

    optimizer = optax.adam(0.05)
    theta, state = jnp.zeros(3), optimizer.init(jnp.zeros(3))

    @jax.jit
    def step(theta, state):
        updates, state = optimizer.update(jax.grad(loss)(theta), state)
        return optax.apply_updates(theta, updates), state

    for _ in range(2000):
        theta, state = step(theta, state)
    np.testing.assert_allclose(jax.nn.log_softmax(theta), optimum, atol=1e-4)
