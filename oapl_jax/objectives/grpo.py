"""GRPO with token-level importance sampling, the paper's baseline (its section 2)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from oapl_jax.config.section import Positive
from oapl_jax.objectives.objective import Objective
from oapl_jax.objectives.surrogate import ClipOptions, TokenOptions, clipped_losses, is_clipped, old_logprobs, ratios
from oapl_jax.types import TrainBatch

STD_FLOOR = 1e-4
"""Added to the group's standard deviation, so that an all-equal group has advantage 0, not 0/0."""


class GrpoOptions(ClipOptions):
    """The clip, and the importance ratio."""

    importance_limit: Positive | None = None
    """Most that pi_old / pi_sampler of a token counts (truncated importance sampling); null: not truncated."""


def advantages(rewards: Float[np.ndarray, "G"], is_scaled: bool = True) -> Float[np.ndarray, "G"]:
    """(r_i - mean r) / (std r + 1e-4) within the group, float64; without the division unless ``is_scaled``."""
    rewards = np.asarray(rewards, np.float64)
    centred = rewards - rewards.mean()
    return centred / (rewards.std() + STD_FLOOR) if is_scaled else centred


def group_advantages(
    rewards: Float[np.ndarray, "G"], is_correct: Bool[np.ndarray, "G"], options: TokenOptions
) -> Float[np.ndarray, "G"]:
    """``advantages`` as the options say, for the record of an objective."""
    return advantages(rewards, options.scale_advantages)


def losses(
    logprobs: Float[Array, "B T"], rows: TrainBatch, options: GrpoOptions, tokens_per_rollout: Float[Array, ""]
) -> Float[Array, "B M"]:
    """-1/|y| sum_t (pi_old / pi_sampler) min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A) of each rollout.

    r_t = pi / pi_old, and pi_old is the policy at the start of the batch. In the first update of a batch r_t is 1, so the
    clip can bind only from the second on (``learner.updates_per_batch``).
    """
    with jax.named_scope("grpo"):
        old = old_logprobs(logprobs, rows)
        importance = ratios(old, rows.sampler_logprobs, rows)
        if options.importance_limit is not None:
            importance = jnp.minimum(importance, options.importance_limit)
        return clipped_losses(ratios(logprobs, old, rows), importance, rows, options, tokens_per_rollout)


def clipped(logprobs: Float[Array, "B T"], rows: TrainBatch, options: GrpoOptions) -> Bool[Array, "B T"]:
    """Where the clip binds, or the limit of the importance ratio."""
    old = old_logprobs(logprobs, rows)
    binds = is_clipped(ratios(logprobs, old, rows), rows, options)
    if options.importance_limit is not None:
        binds |= ratios(old, rows.sampler_logprobs, rows) > options.importance_limit
    return binds


OBJECTIVE = Objective(
    name="grpo",
    advantages=group_advantages,
    losses=losses,
    options=GrpoOptions,
    clipped=clipped,
    needs_old=True,
)
