"""PPO's clipped surrogate (arXiv 1707.06347, Eq. 7) at response tokens, which GRPO, PPO and IcePop share."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from oapl_jax.config.section import Count, Fraction, Positive
from oapl_jax.objectives.objective import ObjectiveOptions
from oapl_jax.objectives.segments import at_tokens, segment_sums
from oapl_jax.types import TrainBatch

Normaliser = Literal["response", "batch"] | Count


class TokenOptions(ObjectiveOptions):
    """Of an objective whose loss is a sum over tokens."""

    normalise_by: Normaliser = "response"
    """What the sum over the tokens of a response is divided by. response: its length (GRPO); batch: the mean length in the
    batch of an update, so that every token weighs the same (DAPO, arXiv 2503.14476); a number: this constant (Dr. GRPO,
    arXiv 2503.20783)."""
    scale_advantages: bool = True
    """Divide advantages by the group's standard deviation; false: r - mean r (Dr. GRPO)."""


class ClipOptions(TokenOptions):
    """Of an objective with the clipped surrogate."""

    clip_low: Fraction = 0.2
    """How far below 1 the ratio counts."""
    clip_high: Positive = 0.2
    """How far above 1 the ratio counts; DAPO's clip-higher is 0.28."""


def old_logprobs(logprobs: Float[Array, "B T"], rows: TrainBatch) -> Float[Array, "B T"]:
    """Of the policy at the start of the batch, without gradient; in a batch of one update that is the policy itself."""
    return jax.lax.stop_gradient(logprobs) if rows.old_logprobs is None else rows.old_logprobs


def ratios(logprobs: Float[Array, "B T"], others: Float[Array, "B T"], rows: TrainBatch) -> Float[Array, "B T"]:
    """exp(logprobs - others) at response tokens, 1 elsewhere."""
    return jnp.exp(jnp.where(rows.response_mask, logprobs - others, 0.0))


def clipped_losses(
    ratio: Float[Array, "B T"],
    weights: Float[Array, "B T"] | float,
    rows: TrainBatch,
    options: ClipOptions,
    tokens_per_rollout: Float[Array, ""],
) -> Float[Array, "B M"]:
    """-weight * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), summed over each rollout's tokens and normalised.

    Where the clip binds the gradient is zero: above it for A > 0, below it for A < 0.
    """
    return rollout_losses(-weights * jnp.minimum(*_gains(ratio, rows, options)), rows, options, tokens_per_rollout)


def is_clipped(ratio: Float[Array, "B T"], rows: TrainBatch, options: ClipOptions) -> Bool[Array, "B T"]:
    """Where the clip binds."""
    plain, bounded = _gains(ratio, rows, options)
    return bounded < plain


def _gains(
    ratio: Float[Array, "B T"], rows: TrainBatch, options: ClipOptions
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """The terms of the minimum: r A, and the same with the clipped r."""
    advantages = at_tokens(rows.advantages, rows.response_ids)
    bounded = jnp.clip(ratio, 1 - options.clip_low, 1 + options.clip_high)
    return ratio * advantages, bounded * advantages


def rollout_losses(
    token_losses: Float[Array, "B T"], rows: TrainBatch, options: TokenOptions, tokens_per_rollout: Float[Array, ""]
) -> Float[Array, "B M"]:
    """The sum over each rollout's response tokens, divided as ``normalise_by`` says."""
    sums = segment_sums(token_losses, rows.response_ids, rows.advantages.shape[1])
    if options.normalise_by == "batch":
        return sums / tokens_per_rollout
    if options.normalise_by == "response":
        lengths = segment_sums(rows.response_mask.astype(jnp.float32), rows.response_ids, rows.advantages.shape[1])
        return sums / jnp.maximum(lengths, 1)
    return sums / options.normalise_by
