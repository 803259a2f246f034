"""GRPO with token-level importance sampling, the paper's baseline (its section 2)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from oapl_jax.objectives.objective import Objective, ObjectiveOptions
from oapl_jax.objectives.segments import segment_sums
from oapl_jax.types import TrainBatch

STD_FLOOR = 1e-4
"""Added to the group's standard deviation, so that an all-equal group has advantage 0, not 0/0."""


def advantages(rewards: Float[np.ndarray, "G"]) -> Float[np.ndarray, "G"]:
    """(r_i - mean r) / (std r + 1e-4) within the group, float64."""
    rewards = np.asarray(rewards, np.float64)
    return (rewards - rewards.mean()) / (rewards.std() + STD_FLOOR)


def losses(
    logprobs: Float[Array, "B T"], rows: TrainBatch, options: ObjectiveOptions, tokens_per_rollout: Float[Array, ""]
) -> Float[Array, "B M"]:
    """-1/|y| sum_t (pi_old / pi_sampler) * (pi / pi_old) * A of each rollout.

    pi_old is the learner at the start of the step. With one update per batch it equals pi, so the
    ratio pi / pi_old is 1 in value and PPO's clip can never bind: only its gradient is left, weighted
    by the untruncated importance ratio (departure 4 in docs/departures.md).
    """
    with jax.named_scope("grpo"):
        is_response, num_rollouts = rows.response_ids > 0, rows.advantages.shape[1]
        old = jax.lax.stop_gradient(logprobs)
        importance = jnp.exp(jnp.where(is_response, old - rows.sampler_logprobs, 0.0))
        gains = segment_sums(importance * jnp.exp(logprobs - old), rows.response_ids, num_rollouts) * rows.advantages
        lengths = segment_sums(is_response.astype(jnp.float32), rows.response_ids, num_rollouts)
        return -gains / jnp.maximum(lengths, 1)


OBJECTIVE = Objective(
    name="grpo",
    advantages=lambda rewards, is_correct, options: advantages(rewards),
    losses=losses,
    options=ObjectiveOptions,
)
