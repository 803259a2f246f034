"""GSPO against a transcription with loops."""

import jax
import jax.numpy as jnp
import numpy as np

from oapl_jax.objectives import gspo
from objectives.rows import make_rows

LOW, HIGH = 0.2, 0.3
IDS = np.array([[0, 1, 1, 0, 2, 2, 2], [0, 0, 1, 0, 0, 2, 0], [0, 1, 1, 1, 0, 2, 2]])
ADVANTAGES = np.array([[1.0, -0.5], [0.25, -2.0], [-1.0, 0.75]], np.float32)


def test_values_and_gradients_equal_the_transcription():
    rng = np.random.default_rng(4)
    logprobs, sampler = -rng.exponential(1.0, (2, *IDS.shape)).astype(np.float32)
    args = make_rows(sampler, IDS, ADVANTAGES), gspo.GspoOptions(clip_low=LOW, clip_high=HIGH), jnp.float32(1)
    losses = gspo.OBJECTIVE.losses(jnp.asarray(logprobs), *args)
    gradient = jax.grad(lambda lp: gspo.OBJECTIVE.losses(lp, *args).sum())(jnp.asarray(logprobs))

    expected, expected_gradient, is_clipped = np.zeros((3, 2)), np.zeros(IDS.shape), np.zeros(IDS.shape, bool)
    for row in range(3):
        for rollout in range(2):
            tokens = [t for t in range(IDS.shape[1]) if IDS[row, t] == rollout + 1]
            log_ratio = sum(float(logprobs[row, t]) - float(sampler[row, t]) for t in tokens) / len(tokens)
            s, a = np.exp(log_ratio), float(ADVANTAGES[row, rollout])
            clipped = min(max(s, 1 - LOW), 1 + HIGH)
            expected[row, rollout] = -min(s * a, clipped * a)
            if s * a <= clipped * a:  # the ratio itself counts, and its derivative by each log-probability is s / |y|
                for t in tokens:
                    expected_gradient[row, t] = -s * a / len(tokens)
            else:
                is_clipped[row, tokens] = True
    assert 0 < is_clipped.sum() < (IDS > 0).sum()
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
    clipped = gspo.OBJECTIVE.clipped(jnp.asarray(logprobs), *args[:2])
    np.testing.assert_array_equal(np.asarray(clipped)[IDS > 0], is_clipped[IDS > 0])


def test_its_advantages_are_grpos_and_its_clip_is_its_own():
    rewards = np.array([1.0, 0.0, 0.0, 1.0])
    options = gspo.GspoOptions()
    advantages = gspo.OBJECTIVE.advantages(rewards, rewards == 1, options)
    np.testing.assert_allclose(advantages, [1, -1, -1, 1], rtol=1e-3)
    assert (options.clip_low, options.clip_high) == (3e-4, 4e-4)  # the paper's section 5.1
