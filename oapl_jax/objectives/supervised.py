"""Supervised fine-tuning on pairs of prompt and response: the negative log-likelihood of a response token.

``oapl-jax sft`` trains with it; a run cannot name it, since its data are no groups.
"""

import dataclasses

from jaxtyping import Array, Float

from oapl_jax.objectives import sft
from oapl_jax.objectives.objective import ObjectiveOptions
from oapl_jax.objectives.segments import segment_sums
from oapl_jax.types import TrainBatch


def losses(
    logprobs: Float[Array, "B T"], rows: TrainBatch, options: ObjectiveOptions, tokens_per_rollout: Float[Array, ""]
) -> Float[Array, "B M"]:
    """-sum_t log pi(y_t) of each response in nats, scaled so that the mean over responses is the mean over tokens."""
    return -segment_sums(logprobs, rows.response_ids, rows.segment_mask.shape[1]) / tokens_per_rollout


OBJECTIVE = dataclasses.replace(sft.OBJECTIVE, name="supervised", losses=losses)
