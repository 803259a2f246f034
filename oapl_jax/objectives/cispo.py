"""CISPO (MiniMax-M1, arXiv 2506.13585, Eqs. 4 and 5): a limit on the importance weight, so that every token has a gradient."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from oapl_jax.config.section import Positive
from oapl_jax.objectives import grpo
from oapl_jax.objectives.objective import Objective
from oapl_jax.objectives.segments import at_tokens
from oapl_jax.objectives.surrogate import Normaliser, TokenOptions, ratios, rollout_losses
from oapl_jax.types import TrainBatch


class CispoOptions(TokenOptions):
    """The limit; every token weighs the same, as in Eq. 4."""

    normalise_by: Normaliser = "batch"
    """As in GRPO."""
    max_ratio: Positive = 5.0
    """Most that pi / pi_sampler of a token counts (ScaleRL, arXiv 2510.13786, uses 4 to 8)."""


def losses(
    logprobs: Float[Array, "B T"], rows: TrainBatch, options: CispoOptions, tokens_per_rollout: Float[Array, ""]
) -> Float[Array, "B M"]:
    """-sum_t min(r_t, max_ratio) A log pi(y_t) of each rollout, over the mean length in the batch; r_t = pi / pi_sampler.

    r_t has no gradient. There is no limit from below, as in the experiments of that paper.
    """
    with jax.named_scope("cispo"):
        ratio = jax.lax.stop_gradient(ratios(logprobs, rows.sampler_logprobs, rows))
        weights = jnp.minimum(ratio, options.max_ratio) * at_tokens(rows.advantages, rows.response_ids)
        return rollout_losses(-weights * logprobs, rows, options, tokens_per_rollout)


def clipped(logprobs: Float[Array, "B T"], rows: TrainBatch, options: CispoOptions) -> Bool[Array, "B T"]:
    """Where the limit binds."""
    return ratios(logprobs, rows.sampler_logprobs, rows) > options.max_ratio


OBJECTIVE = Objective(
    name="cispo", advantages=grpo.group_advantages, losses=losses, options=CispoOptions, clipped=clipped
)
