"""RLOO's loss with GRPO's advantage ("Efficient Post-training ... With Offline RL", Eq. 3)."""

import dataclasses

from oapl_jax.objectives import grpo, rloo

OBJECTIVE = dataclasses.replace(
    rloo.OBJECTIVE, name="rloo_grpo", advantages=lambda rewards, is_correct, options: grpo.advantages(rewards)
)
