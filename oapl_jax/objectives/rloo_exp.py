"""RLOO's loss with the exponential of GRPO's advantage ("Efficient Post-training ... With Offline RL", Eq. 4).

All advantages are positive, so wrong responses are imitated too, but less. They are 1 in a group whose rewards are all
equal: leave such groups out, or an all-wrong group is imitated.
"""

import dataclasses

import numpy as np

from oapl_jax.objectives import grpo, rloo

OBJECTIVE = dataclasses.replace(
    rloo.OBJECTIVE, name="rloo_exp", advantages=lambda rewards, is_correct, options: np.exp(grpo.advantages(rewards))
)
