"""PPO's clip on the ratio to the sampler (arXiv 1707.06347, Eq. 7), with GRPO's advantage and no critic."""

import jax
from jaxtyping import Array, Bool, Float

from oapl_jax.objectives import grpo
from oapl_jax.objectives.objective import Objective
from oapl_jax.objectives.surrogate import ClipOptions, clipped_losses, is_clipped, ratios
from oapl_jax.types import TrainBatch


def losses(
    logprobs: Float[Array, "B T"], rows: TrainBatch, options: ClipOptions, tokens_per_rollout: Float[Array, ""]
) -> Float[Array, "B M"]:
    """-1/|y| sum_t min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A) of each rollout, with r_t = pi / pi_sampler."""
    with jax.named_scope("ppo"):
        ratio = ratios(logprobs, rows.sampler_logprobs, rows)
        return clipped_losses(ratio, 1.0, rows, options, tokens_per_rollout)


def clipped(logprobs: Float[Array, "B T"], rows: TrainBatch, options: ClipOptions) -> Bool[Array, "B T"]:
    """Where the clip binds."""
    return is_clipped(ratios(logprobs, rows.sampler_logprobs, rows), rows, options)


OBJECTIVE = Objective(name="ppo", advantages=grpo.group_advantages, losses=losses, options=ClipOptions, clipped=clipped)
