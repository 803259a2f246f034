"""The objectives by the names that ``objective.name`` gives them."""

from typing import Any

from oapl_jax.objectives import (
    a_star_po,
    cispo,
    dro,
    grpo,
    gspo,
    icepop,
    kimi,
    oapl,
    ppo,
    rloo,
    rloo_exp,
    rloo_grpo,
    sft,
)
from oapl_jax.objectives.objective import Objective

OBJECTIVES: dict[str, Objective[Any]] = {
    module.OBJECTIVE.name: module.OBJECTIVE
    for module in (oapl, a_star_po, kimi, dro, grpo, ppo, cispo, icepop, gspo, sft, rloo, rloo_grpo, rloo_exp)
}
