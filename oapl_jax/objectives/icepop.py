"""IcePop: GRPO without the tokens at which learner and sampler disagree (Ling team, 2025; arXiv 2510.18855)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from oapl_jax.config.section import Positive
from oapl_jax.objectives import grpo
from oapl_jax.objectives.objective import Objective
from oapl_jax.objectives.surrogate import ClipOptions, clipped_losses, is_clipped, old_logprobs, ratios
from oapl_jax.types import TrainBatch


class IcepopOptions(ClipOptions):
    """The clip, and the band of ratios that count."""

    mask_low: Positive = 0.5
    """Least pi_old / pi_sampler of a token that counts."""
    mask_high: Positive = 5.0
    """Most of it."""


def losses(
    logprobs: Float[Array, "B T"], rows: TrainBatch, options: IcepopOptions, tokens_per_rollout: Float[Array, ""]
) -> Float[Array, "B M"]:
    """-1/|y| sum_t M(pi_old / pi_sampler) min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A) of each rollout.

    M(k) is k for mask_low <= k <= mask_high, else 0; r_t = pi / pi_old as in GRPO. A token that is left out still counts
    in |y|.
    """
    with jax.named_scope("icepop"):
        old = old_logprobs(logprobs, rows)
        importance = ratios(old, rows.sampler_logprobs, rows)
        weights = jnp.where(_is_within(importance, options), importance, 0.0)
        return clipped_losses(ratios(logprobs, old, rows), weights, rows, options, tokens_per_rollout)


def clipped(logprobs: Float[Array, "B T"], rows: TrainBatch, options: IcepopOptions) -> Bool[Array, "B T"]:
    """The tokens that are left out, and those where the clip binds."""
    old = old_logprobs(logprobs, rows)
    is_within = _is_within(ratios(old, rows.sampler_logprobs, rows), options)
    return ~is_within | is_clipped(ratios(logprobs, old, rows), rows, options)


def _is_within(importance: Float[Array, "B T"], options: IcepopOptions) -> Bool[Array, "B T"]:
    return (options.mask_low <= importance) & (importance <= options.mask_high)


OBJECTIVE = Objective(
    name="icepop",
    advantages=grpo.group_advantages,
    losses=losses,
    options=IcepopOptions,
    clipped=clipped,
    needs_old=True,
)
