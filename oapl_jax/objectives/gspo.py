"""GSPO (arXiv 2507.18071): a clipped importance ratio of whole sequences, normalised by their length."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oapl_jax.objectives.segments import segment_sums


def sequence_losses(
    logprobs: Float[Array, "B T"],
    sampler_logprobs: Float[Array, "B T"],
    response_ids: Int[Array, "B T"],
    advantages: Float[Array, "B M"],
    *,
    clip_low: float,
    clip_high: float,
) -> Float[Array, "B M"]:
    """-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) of each rollout, its Eqs. 5 and 7; arguments as for OAPL.

    s = (pi(y|x) / pi_old(y|x))^(1/|y|), where pi_old is the distribution that drew y: the sampler's. A is GRPO's. Where the clip
    binds the gradient is zero.
    """
    with jax.named_scope("gspo"):
        num_rollouts = advantages.shape[1]
        lengths = segment_sums((response_ids > 0).astype(jnp.float32), response_ids, num_rollouts)
        log_ratios = segment_sums(logprobs - sampler_logprobs, response_ids, num_rollouts)
        ratios = jnp.exp(log_ratios / jnp.maximum(lengths, 1))
        clipped = jnp.clip(ratios, 1 - clip_low, 1 + clip_high)
        return -jnp.minimum(ratios * advantages, clipped * advantages)
