"""The offline objectives against transcriptions of the paper's equations with loops, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oapl_jax.objectives import rloo, rloo_exp
from oapl_jax.objectives.catalogue import OBJECTIVES
from objectives.rows import make_rows

REWARDS = np.array([1.0, -0.1, -0.5, -1.0])
"""Accepted, wrong answer, time limit, compile error."""
IS_CORRECT = REWARDS == 1.0
# Two rows of two packed rollouts: prompt tokens and padding are 0.
RESPONSE_IDS = np.array([[0, 1, 1, 0, 2, 2, 2], [0, 0, 1, 0, 0, 2, 0]])


def transcribed_advantages(name):
    """Eqs. 2 to 4, and the indicator of a correct response for SFT."""
    n, total, found = len(REWARDS), sum(REWARDS), []
    mean = total / n
    std = (sum((r - mean) ** 2 for r in REWARDS) / n) ** 0.5
    for r in REWARDS:
        others = (total - r) / (n - 1)
        grpo = (r - mean) / (std + 1e-4)
        found.append(
            {"sft": float(r == 1.0), "rloo": r - others, "rloo_grpo": grpo, "rloo_exp": 2.718281828459045**grpo}[name]
        )
    return found


@pytest.mark.parametrize("name", ["sft", "rloo", "rloo_grpo", "rloo_exp"])
def test_objectives_equal_the_transcription_in_value_and_gradient(name):
    objective = OBJECTIVES[name]
    options = objective.options()
    advantages = objective.advantages(REWARDS, IS_CORRECT, options)
    np.testing.assert_allclose(advantages, transcribed_advantages(name), rtol=1e-12, atol=1e-15)

    rng = np.random.default_rng(3)
    logprobs = -rng.exponential(1.0, RESPONSE_IDS.shape).astype(np.float32)
    logprobs[RESPONSE_IDS == 0] = np.nan  # prompts and padding must not matter
    no_logprobs = np.full(RESPONSE_IDS.shape, np.nan, np.float32)
    args = make_rows(no_logprobs, RESPONSE_IDS, advantages.reshape(2, 2).astype(np.float32)), options, jnp.float32(1)
    losses = objective.losses(jnp.asarray(logprobs), *args)
    gradient = jax.grad(lambda lp: objective.losses(lp, *args).sum())(jnp.asarray(logprobs))
    assert not objective.needs_sampler_logprobs

    expected, expected_gradient = np.zeros((2, 2)), np.zeros(RESPONSE_IDS.shape)
    for i, advantage in enumerate(transcribed_advantages(name)):
        row, rollout = divmod(i, 2)
        for t in range(RESPONSE_IDS.shape[1]):
            if RESPONSE_IDS[row, t] == rollout + 1:
                expected[row, rollout] -= advantage * float(logprobs[row, t])
                expected_gradient[row, t] = -advantage
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6)


def test_a_group_of_equal_rewards_teaches_nothing_but_by_the_exponential():
    equal = np.full(4, -0.1)
    assert (rloo.leave_one_out(equal) == 0).all()
    np.testing.assert_allclose(rloo_exp.OBJECTIVE.advantages(equal, equal > 0, None), 1.0)


def test_leave_one_out_of_one_rollout_is_an_error():
    with pytest.raises(ValueError, match="at least 2 rollouts"):
        rloo.leave_one_out(np.array([1.0]))
