"""Supervised fine-tuning: the negative log-likelihood of given responses."""

from jaxtyping import Array, Float, Int

from oapl_jax.objectives.segments import segment_sums


def sequence_losses(
    logprobs: Float[Array, "B T"], response_ids: Int[Array, "B T"], num_rollouts: int
) -> Float[Array, "B M"]:
    """-sum_t log pi(y_t) of each response in nats; divide their sum by the number of response tokens."""
    return -segment_sums(logprobs, response_ids, num_rollouts)
