"""RLOO on given responses ("Efficient Post-training ... With Offline RL", Eqs. 1 and 2).

The responses come from an unknown policy, so there are no ratios and no log-probabilities but the learner's own.
"""

import jax
import numpy as np
from jaxtyping import Array, Float

from oapl_jax.objectives.objective import Objective, ObjectiveOptions
from oapl_jax.objectives.segments import segment_sums
from oapl_jax.types import TrainBatch


def leave_one_out(rewards: Float[np.ndarray, "G"]) -> Float[np.ndarray, "G"]:
    """r_i less the mean reward of the others (Eq. 2), float64; all zero for a group whose rewards are all equal.

    Raises:
        ValueError: for fewer than two rewards, which have no others.
    """
    rewards = np.asarray(rewards, np.float64)
    if len(rewards) < 2:
        raise ValueError(f"leave-one-out needs at least 2 rollouts of a prompt; got {len(rewards)}")
    # r_i - (sum - r_i) / (n - 1) = (r_i - mean) n / (n - 1); from the first reward on, so that equal ones give 0 exactly
    shifted = rewards - rewards[0]
    return (shifted - shifted.mean()) * (len(rewards) / (len(rewards) - 1))


def losses(
    logprobs: Float[Array, "B T"], rows: TrainBatch, options: ObjectiveOptions, tokens_per_rollout: Float[Array, ""]
) -> Float[Array, "B M"]:
    """-A_i sum_t log pi(y_t) of each rollout (Eq. 1): its gradient is REINFORCE's, its value says little."""
    with jax.named_scope("rloo"):
        return -rows.advantages * segment_sums(logprobs, rows.response_ids, rows.advantages.shape[1])


OBJECTIVE = Objective(
    name="rloo",
    advantages=lambda rewards, is_correct, options: leave_one_out(rewards),
    losses=losses,
    options=ObjectiveOptions,
    needs_sampler_logprobs=False,
)
