"""Supervised fine-tuning: the negative log-likelihood of given responses."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def sequence_losses(logprobs: Float[Array, "B T"], response_mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
    """-sum_t log pi(y_t) of each row in nats; divide their sum by the number of response tokens."""
    return -jnp.where(response_mask, logprobs, 0.0).sum(axis=-1)
