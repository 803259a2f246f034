"""GSPO (arXiv 2507.18071): a clipped importance ratio of whole sequences, normalised by their length."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from oapl_jax.config.section import Positive
from oapl_jax.objectives import grpo
from oapl_jax.objectives.objective import Objective, ObjectiveOptions
from oapl_jax.objectives.segments import segment_sums, tokens_of
from oapl_jax.types import TrainBatch


class GspoOptions(ObjectiveOptions):
    """The clip, by default that of the paper's section 5.1."""

    clip_low: Positive = 3e-4
    """How far below 1 the ratio counts."""
    clip_high: Positive = 4e-4
    """How far above 1 the ratio counts."""


def losses(
    logprobs: Float[Array, "B T"], rows: TrainBatch, options: GspoOptions, tokens_per_rollout: Float[Array, ""]
) -> Float[Array, "B M"]:
    """-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) of each rollout, its Eqs. 5 and 7.

    s = (pi(y|x) / pi_old(y|x))^(1/|y|), where pi_old is the distribution that drew y: the sampler's. A is GRPO's. Where
    the clip binds the gradient is zero.
    """
    with jax.named_scope("gspo"):
        return -jnp.minimum(*_gains(logprobs, rows, options))


def clipped(logprobs: Float[Array, "B T"], rows: TrainBatch, options: GspoOptions) -> Bool[Array, "B T"]:
    """The tokens of the rollouts whose clip binds: the share that its section 5.2 reports."""
    plain, bounded = _gains(logprobs, rows, options)
    return tokens_of(bounded < plain, rows.response_ids)


def _gains(
    logprobs: Float[Array, "B T"], rows: TrainBatch, options: GspoOptions
) -> tuple[Float[Array, "B M"], Float[Array, "B M"]]:
    """The terms of the minimum: s A, and the same with the clipped s."""
    ids, num_rollouts = rows.response_ids, rows.advantages.shape[1]
    lengths = segment_sums((ids > 0).astype(jnp.float32), ids, num_rollouts)
    log_ratios = segment_sums(logprobs - rows.sampler_logprobs, ids, num_rollouts)
    ratios = jnp.exp(log_ratios / jnp.maximum(lengths, 1))
    bounded = jnp.clip(ratios, 1 - options.clip_low, 1 + options.clip_high)
    return ratios * rows.advantages, bounded * rows.advantages


OBJECTIVE = Objective(
    name="gspo",
    advantages=grpo.OBJECTIVE.advantages,
    losses=losses,
    options=GspoOptions,
    clipped=clipped,
)
