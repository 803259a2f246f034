"""The GRPO baseline against a transcription with loops."""

import jax
import jax.numpy as jnp
import numpy as np

from oapl_jax.objectives import grpo
from objectives.rows import make_rows


def test_gradient_is_the_importance_weighted_policy_gradient():
    rng = np.random.default_rng(1)
    logprobs, sampler = -rng.exponential(1.0, (2, 4, 5)).astype(np.float32)
    mask = np.array([[0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 1], [0, 0, 1, 1, 1]], bool)
    advantages = np.array([[1.0], [-0.5], [0.25], [0.0]], np.float32)
    gradient = jax.grad(
        lambda lp: grpo.OBJECTIVE.losses(
            lp, make_rows(sampler, mask, advantages), grpo.GrpoOptions(), jnp.float32(1)
        ).sum()
    )(jnp.asarray(logprobs))
    expected = np.zeros((4, 5))
    for i in range(4):
        for t in range(5):
            if mask[i, t]:
                expected[i, t] = -np.exp(logprobs[i, t] - sampler[i, t]) * advantages[i, 0] / mask[i].sum()
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def test_advantages_are_standardised_and_zero_for_an_equal_group():
    advantages = grpo.advantages(np.array([1.0, 0.0, 0.0, 1.0]))
    np.testing.assert_allclose(advantages, [1, -1, -1, 1], rtol=1e-3)
    assert (grpo.advantages(np.ones(4)) == 0).all()
