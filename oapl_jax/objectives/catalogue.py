"""The objectives by the names that ``objective.name`` gives them."""

from typing import Any

from oapl_jax.objectives import grpo, gspo, oapl, rloo, rloo_exp, rloo_grpo, sft
from oapl_jax.objectives.objective import Objective

OBJECTIVES: dict[str, Objective[Any]] = {
    module.OBJECTIVE.name: module.OBJECTIVE for module in (oapl, grpo, gspo, sft, rloo, rloo_grpo, rloo_exp)
}
