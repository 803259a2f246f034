"""GRPO, PPO, CISPO and IcePop against one transcription with loops: values, gradients, and two optimizer steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oapl_jax.objectives import grpo
from oapl_jax.objectives.catalogue import OBJECTIVES
from objectives.rows import make_rows

IDS = np.array([[0, 1, 1, 0, 2, 2, 2, 2], [0, 0, 1, 0, 0, 2, 2, 0], [1, 1, 1, 1, 0, 0, 2, 2]])
ADVANTAGES = np.array([[1.0, -0.5], [0.25, -2.0], [-1.0, 0.75]], np.float32)
TOKENS_PER_ROLLOUT = float((IDS > 0).sum() / 6)
CASES = [
    ("grpo", {}),
    ("grpo", {"clip_high": 0.28, "normalise_by": "batch"}),
    ("grpo", {"importance_limit": 1.5, "normalise_by": 8}),
    ("ppo", {"clip_low": 0.1}),
    ("cispo", {"max_ratio": 1.3}),
    ("icepop", {"mask_low": 0.7, "mask_high": 1.6}),
]


def draw():
    """Log-probabilities of the policy, of the old one and of the sampler, near each other."""
    rng = np.random.default_rng(5)
    logprobs = -rng.exponential(1.0, IDS.shape) - 1
    old = logprobs + 0.3 * rng.normal(size=IDS.shape)
    return logprobs, old, old + 0.5 * rng.normal(size=IDS.shape)


def transcription(name, options, logprobs, old, sampler):
    """Losses of the rollouts, the gradient of their sum, and which tokens the clip, the limit or the mask met."""
    losses, gradient, met = np.zeros(ADVANTAGES.shape), np.zeros(IDS.shape), np.zeros(IDS.shape, bool)
    for row, rollout in np.ndindex(ADVANTAGES.shape):
        tokens = [t for t in range(IDS.shape[1]) if IDS[row, t] == rollout + 1]
        a = float(ADVANTAGES[row, rollout])
        by = {"response": len(tokens), "batch": TOKENS_PER_ROLLOUT}.get(options.normalise_by, options.normalise_by)
        for t in tokens:
            weight = np.exp(old[row, t] - sampler[row, t])
            r = np.exp(logprobs[row, t] - (sampler if name in ("ppo", "cispo") else old)[row, t])
            if name == "cispo":
                met[row, t] = r > options.max_ratio
                factor = min(r, options.max_ratio) * a
                losses[row, rollout] -= factor * logprobs[row, t] / by
                gradient[row, t] = -factor / by
                continue
            if name == "ppo":
                weight = 1.0
            elif name == "icepop":
                is_out = not options.mask_low <= weight <= options.mask_high
                met[row, t], weight = is_out, 0.0 if is_out else weight
            elif options.importance_limit is not None:
                met[row, t] = weight > options.importance_limit
                weight = min(weight, options.importance_limit)
            clipped = min(max(r, 1 - options.clip_low), 1 + options.clip_high)
            losses[row, rollout] -= weight * min(r * a, clipped * a) / by
            if r * a <= clipped * a:
                gradient[row, t] = -weight * r * a / by
            else:
                met[row, t] = True
    return losses, gradient, met


@pytest.mark.parametrize(("name", "given"), CASES)
def test_values_and_gradients_equal_the_transcription(name, given):
    objective, (logprobs, old, sampler) = OBJECTIVES[name], draw()
    options = objective.options(**given)
    outside = np.where(IDS > 0, 0, np.nan)  # what stands there must not matter
    rows = make_rows(sampler + outside, IDS, ADVANTAGES)._replace(old_logprobs=jnp.asarray(old + outside))

    def losses(logprobs):
        return objective.losses(logprobs, rows, options, jnp.float32(TOKENS_PER_ROLLOUT))

    found, pull = jax.vjp(losses, jnp.asarray(logprobs + outside))
    expected, gradient, met = transcription(name, options, logprobs, old, sampler)
    assert 1 < met.sum() < (IDS > 0).sum()
    clipped = objective.clipped(jnp.asarray(logprobs + outside), rows, options)
    np.testing.assert_array_equal(np.asarray(clipped)[IDS > 0], met[IDS > 0])
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(pull(jnp.ones_like(found))[0], gradient, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "given"), CASES)
def test_two_steps_on_one_batch_keep_the_old_policy_of_its_start(name, given):
    """Gradient descent in the log-probabilities; other tokens are clipped or limited in the second step."""
    objective, (old, _, sampler), rate = OBJECTIVES[name], draw(), 2.0
    options = objective.options(**given)
    rows = make_rows(sampler, IDS, ADVANTAGES)._replace(old_logprobs=jnp.asarray(old))
    gradient = jax.grad(lambda lp: objective.losses(lp, rows, options, jnp.float32(TOKENS_PER_ROLLOUT)).sum())
    found, expected, met = jnp.asarray(old), old, []
    for _ in range(2):
        found = found - rate * gradient(found)
        _, slope, number = transcription(name, options, expected, old, sampler)
        expected = expected - rate * slope
        met.append(number.sum())
    assert met[1] > 1
    assert met[1] != met[0]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["grpo", "icepop"])
def test_without_an_old_policy_the_policy_itself_is_old(name):
    objective, (logprobs, _, sampler) = OBJECTIVES[name], draw()
    rows = make_rows(sampler, IDS, ADVANTAGES)
    args = objective.options(), jnp.float32(1)
    gradient = jax.grad(lambda lp, rows: objective.losses(lp, rows, *args).sum())
    same = rows._replace(old_logprobs=jnp.asarray(logprobs))
    np.testing.assert_array_equal(gradient(jnp.asarray(logprobs), rows), gradient(jnp.asarray(logprobs), same))


def test_advantages_without_the_deviation():
    rewards = np.array([1.0, 0.0, 0.0, 0.0])
    found = grpo.OBJECTIVE.advantages(rewards, rewards == 1, grpo.GrpoOptions(scale_advantages=False))
    np.testing.assert_allclose(found, [0.75, -0.25, -0.25, -0.25])
