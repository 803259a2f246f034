"""Fine-tuning on the correct responses of a group: RLOO's loss, where each of them counts 1 and any other 0."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from oapl_jax.objectives import rloo


def advantages(is_correct: Bool[np.ndarray, "G"]) -> Float[np.ndarray, "G"]:
    """1 for a correct response and 0 for any other."""
    return np.asarray(is_correct, np.float64)


OBJECTIVE = dataclasses.replace(
    rloo.OBJECTIVE, name="sft", advantages=lambda rewards, is_correct, options: advantages(is_correct)
)
