"""DRO (arXiv 2405.19107): a squared regression of the log-ratio of each token, as verl and Tinker have it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oapl_jax.config.section import Positive
from oapl_jax.objectives import grpo
from oapl_jax.objectives.objective import Objective
from oapl_jax.objectives.segments import at_tokens
from oapl_jax.objectives.surrogate import Normaliser, TokenOptions, rollout_losses
from oapl_jax.types import TrainBatch


class DroOptions(TokenOptions):
    """The weight of the log-ratio; by default the tokens of a response are summed, and r - mean r is the advantage."""

    normalise_by: Normaliser = 1
    """As in GRPO."""
    scale_advantages: bool = False
    """As in GRPO."""
    beta2: Positive = 0.05
    """Weight of the squared log-ratio of a token; Tinker's example has 0.05, verl's 0.1."""


def losses(
    logprobs: Float[Array, "B T"], rows: TrainBatch, options: DroOptions, tokens_per_rollout: Float[Array, ""]
) -> Float[Array, "B M"]:
    """sum_t (beta2 / 2 l_t^2 - A l_t) of each rollout, with l_t = log(pi(y_t) / pi_sampler(y_t)).

    But for a constant this is sum_t (beta2 l_t - A)^2 / (2 beta2): every token is regressed onto the whole advantage,
    where OAPL regresses their sum.
    """
    with jax.named_scope("dro"):
        log_ratios = jnp.where(rows.response_mask, logprobs - rows.sampler_logprobs, 0.0)
        advantages = at_tokens(rows.advantages, rows.response_ids)
        token_losses = options.beta2 / 2 * jnp.square(log_ratios) - advantages * log_ratios
        return rollout_losses(token_losses, rows, options, tokens_per_rollout)


OBJECTIVE = Objective(name="dro", advantages=grpo.group_advantages, losses=losses, options=DroOptions)
