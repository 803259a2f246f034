"""The squared regressions beside OAPL: DRO of tokens, Kimi and A*-PO of sequences, against transcriptions with loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oapl_jax.objectives import oapl
from oapl_jax.objectives.catalogue import OBJECTIVES
from oapl_jax.rollouts.grading import Advantages
from oapl_jax.types import FinishReason, Grade, GradedRollout, Rollout, Verdict
from objectives.rows import make_rows

IDS = np.array([[0, 1, 1, 0, 2, 2, 2], [0, 0, 1, 0, 0, 2, 0]])
REWARDS = np.array([1.0, 0.0, 0.25, 0.0])
BETA2 = 0.3
GRADED = [
    GradedRollout(Rollout(np.ones(1, np.int32), np.zeros(1, np.float32), FinishReason.STOP), "", grade)
    for grade in (Grade(Verdict.CORRECT if reward == 1 else Verdict.WRONG, reward) for reward in REWARDS)
]


VALUE = 0.4
"""Of the prompt, from samples of the reference."""


def drop_positions_outside(array):
    return np.where(IDS > 0, array, np.nan)


def transcription(name, logprobs, sampler, normalise_by=1):
    """Losses of the rollouts and the gradient of their sum; A is the reward less the group's mean, or less V*."""
    losses, gradient = np.zeros((2, 2)), np.zeros(IDS.shape)
    for row, rollout in np.ndindex(2, 2):
        tokens = [t for t in range(IDS.shape[1]) if IDS[row, t] == rollout + 1]
        a = REWARDS[2 * row + rollout] - (VALUE if name == "a_star_po" else sum(REWARDS) / 4)
        log_ratios = {t: logprobs[row, t] - sampler[row, t] for t in tokens}
        if name in ("kimi", "a_star_po"):
            residual = BETA2 * sum(log_ratios.values()) - a
            losses[row, rollout] = residual**2
            gradient[row, tokens] = 2 * BETA2 * residual
        else:
            by = len(tokens) if normalise_by == "response" else normalise_by
            for t, log_ratio in log_ratios.items():
                losses[row, rollout] += (BETA2 / 2 * log_ratio**2 - a * log_ratio) / by
                gradient[row, t] = (BETA2 * log_ratio - a) / by
    return losses, gradient


CASES = [("kimi", {}), ("dro", {}), ("dro", {"normalise_by": "response"}), ("a_star_po", {"values": "generated"})]


@pytest.mark.parametrize(("name", "given"), CASES)
def test_values_gradients_and_two_steps_equal_the_transcription(name, given):
    objective, rng = OBJECTIVES[name], np.random.default_rng(6)
    options = objective.options(beta2=BETA2, **given)
    grading = Advantages(
        lambda rewards, is_correct: objective.advantages(rewards, is_correct, options),
        lambda rewards: 0.0,
        "wrong",
        {"prompt": VALUE} if objective.needs_values else None,
    )
    advantages = np.array(grading("prompt", GRADED)[0], np.float32).reshape(2, 2)
    sampler = -rng.exponential(1.0, IDS.shape)
    rows = make_rows(drop_positions_outside(sampler), IDS, advantages)
    if objective.needs_reference:  # in the place of the sampler, which must not matter
        rows = make_rows(np.full(IDS.shape, np.nan), IDS, advantages)._replace(reference_logprobs=rows.sampler_logprobs)
    found = jnp.asarray(drop_positions_outside(sampler + 0.5 * rng.normal(size=IDS.shape)))
    expected = np.asarray(found, np.float64)
    for _ in range(2):
        losses, pull = jax.vjp(lambda lp: objective.losses(lp, rows, options, jnp.float32(1)), found)
        slope = pull(jnp.ones_like(losses))[0]
        expected_losses, expected_slope = transcription(name, expected, sampler, given.get("normalise_by", 1))
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(slope, expected_slope, rtol=1e-5, atol=1e-6)
        found, expected = found - slope, expected - expected_slope


def test_each_token_of_dro_goes_to_the_advantage_over_beta2():
    objective = OBJECTIVES["dro"]
    rows = make_rows(-np.ones((1, 3)), np.ones((1, 3)), np.full((1, 1), 0.6, np.float32))
    gradient = jax.grad(lambda lp: objective.losses(lp, rows, objective.options(beta2=BETA2), jnp.float32(1)).sum())
    np.testing.assert_allclose(gradient(jnp.full((1, 3), -1 + 0.6 / BETA2)), 0, atol=1e-6)


def test_the_metrics_take_the_temperatures_of_the_objective_and_else_those_of_oapl():
    own = OBJECTIVES["kimi"].options(beta2=0.2)
    assert oapl.options_or_defaults(own) == oapl.OaplOptions(beta1=1.0, beta2=0.2)
    assert oapl.options_or_defaults(OBJECTIVES["ppo"].options()) == oapl.OaplOptions()
