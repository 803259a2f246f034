"""The divergence from a frozen reference policy, a penalty that every objective may have (``objective.kl_weight``)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from oapl_jax.objectives.segments import segment_sums
from oapl_jax.types import TrainBatch


def divergences(logprobs: Float[Array, "B T"], rows: TrainBatch) -> Float[Array, "B M"]:
    """1/|y| sum_t (exp(d_t) - d_t - 1) of each rollout in nats a token, d_t = log(pi_reference(y_t) / pi(y_t)).

    GRPO's estimate of KL(pi || pi_reference) (DeepSeekMath, arXiv 2402.03300, Eq. 4; Schulman's k3): never negative. It is
    taken at the sampler's tokens as they are, without an importance ratio.
    """
    assert rows.reference_logprobs is not None
    num_rollouts = rows.segment_mask.shape[1]
    d = jnp.where(rows.response_mask, rows.reference_logprobs - logprobs, 0.0)
    sums = segment_sums(jnp.expm1(d) - d, rows.response_ids, num_rollouts)
    lengths = segment_sums(rows.response_mask.astype(jnp.float32), rows.response_ids, num_rollouts)
    return sums / jnp.maximum(lengths, 1)
