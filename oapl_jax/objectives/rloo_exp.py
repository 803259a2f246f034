"""RLOO's loss with the exponential of GRPO's advantage ("Efficient Post-training ... With Offline RL", Eq. 4)."""

import dataclasses

import numpy as np
from jaxtyping import Float

from oapl_jax.objectives import grpo, rloo


def advantages(rewards: Float[np.ndarray, "G"]) -> Float[np.ndarray, "G"]:
    """Exp of GRPO's advantage, float64: all positive, so wrong responses are imitated too, but less.

    All are 1 in a group whose rewards are all equal: leave such groups out, or an all-wrong group is imitated.
    """
    return np.exp(grpo.advantages(rewards))


OBJECTIVE = dataclasses.replace(
    rloo.OBJECTIVE, name="rloo_exp", advantages=lambda rewards, is_correct, options: advantages(rewards)
)
