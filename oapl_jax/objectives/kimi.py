"""Kimi k1.5's regression (arXiv 2501.12599, its Eq. 3): OAPL's with the group's mean reward in the place of V*.

REBEL (arXiv 2404.16767) and AGRO (arXiv 2503.19612) regress the same log-ratio onto differences of rewards within a group.
"""

from oapl_jax.objectives import grpo, oapl
from oapl_jax.objectives.objective import Objective

OBJECTIVE = Objective(
    name="kimi",
    advantages=lambda rewards, is_correct, options: grpo.advantages(rewards, is_scaled=False),
    losses=oapl.losses,
    options=oapl.RegressionOptions,
)
