"""The offline objectives against transcriptions of the paper's equations with loops, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oapl_jax.config.schema import ObjectiveConfig
from oapl_jax.learner.step import make_advantage_fn, make_loss_fn
from oapl_jax.objectives import rloo
from oapl_jax.types import TrainBatch

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
    config = ObjectiveConfig(name=name)
    advantages = make_advantage_fn(config)(REWARDS, IS_CORRECT)
    np.testing.assert_allclose(advantages, transcribed_advantages(name), rtol=1e-12, atol=1e-15)

    rng = np.random.default_rng(3)
    logprobs = -rng.exponential(1.0, RESPONSE_IDS.shape).astype(np.float32)
    logprobs[RESPONSE_IDS == 0] = np.nan  # prompts and padding must not matter
    batch = TrainBatch(
        tokens=np.zeros_like(RESPONSE_IDS),
        positions=np.zeros_like(RESPONSE_IDS),
        segment_ids=RESPONSE_IDS,
        response_mask=RESPONSE_IDS > 0,
        sampler_logprobs=np.full(RESPONSE_IDS.shape, np.nan, np.float32),  # these objectives have none
        advantages=advantages.reshape(2, 2).astype(np.float32),
        segment_mask=np.ones((2, 2), bool),
    )
    batch = jax.tree.map(jnp.asarray, batch)
    loss_fn = make_loss_fn(config)
    losses = loss_fn(jnp.asarray(logprobs), batch, jnp.float32(1))
    gradient = jax.grad(lambda lp: loss_fn(lp, batch, jnp.float32(1)).sum())(jnp.asarray(logprobs))

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
    np.testing.assert_allclose(rloo.exponential(equal), 1.0)


def test_leave_one_out_of_one_rollout_is_an_error():
    with pytest.raises(ValueError, match="at least 2 rollouts"):
        rloo.leave_one_out(np.array([1.0]))
