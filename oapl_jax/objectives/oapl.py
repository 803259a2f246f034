"""OAPL: squared regression of the log-ratio onto the optimal advantage (paper Eqs. 2 and 3)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from oapl_jax.config.section import Positive
from oapl_jax.objectives.objective import Objective, ObjectiveOptions
from oapl_jax.objectives.segments import segment_sums
from oapl_jax.types import TrainBatch


class RegressionOptions(ObjectiveOptions):
    """Of a regression of the log-ratio of whole responses."""

    beta2: Positive = 1e-3
    """Weight of the log-ratio (Eq. 3); shrinks with response length: about 0.1 for 6 tokens, 1e-3 for thousands."""


class OaplOptions(RegressionOptions):
    """The two temperatures."""

    beta1: Positive = 1.0
    """Temperature of V* (Eq. 2)."""


def options_or_defaults(options: ObjectiveOptions) -> OaplOptions:
    """The temperatures for the V* of the log and the residual of the metrics, which every objective reports.

    Those that the objective has itself, and OAPL's defaults for the others.
    """
    names = OaplOptions.model_fields.keys() & type(options).model_fields.keys()
    return OaplOptions(**{name: getattr(options, name) for name in names})


def optimal_value(rewards: Float[np.ndarray, "G"], beta1: float) -> float:
    """V*(x) = beta1 * (logsumexp_i(r_i / beta1) - log G), Eq. 2, in float64.

    Shifted by the largest reward, so that r / beta1 of 1e4 is as exact as of 1. beta1 -> 0 gives max r, beta1 -> inf
    mean r.

    Raises:
        ValueError: for an empty group or a reward that is not finite.
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.size == 0 or not np.isfinite(rewards).all():
        raise ValueError(f"V* needs finite rewards of at least one rollout; got {rewards.tolist()}")
    highest = rewards.max()
    # log-mean-exp as log1p(mean(expm1)): at large beta1 the exponents are near 0, where
    # log(mean(exp)) would lose the mean in rounding.
    return float(highest + beta1 * np.log1p(np.mean(np.expm1((rewards - highest) / beta1))))


def advantages(rewards: Float[np.ndarray, "G"], beta1: float) -> Float[np.ndarray, "G"]:
    """A*_i = r_i - V*(x), float64; all zero for a group whose rewards are all equal."""
    return np.asarray(rewards, np.float64) - optimal_value(rewards, beta1)


def log_ratios(
    logprobs: Float[Array, "B T"],
    sampler_logprobs: Float[Array, "B T"],
    response_ids: Int[Array, "B T"],
    num_rollouts: int,
) -> Float[Array, "B M"]:
    """log(pi(y|x) / pi_sampler(y|x)) of each rollout in nats: the sum over its response tokens, float32.

    The difference is taken per token before the sum: both sums are large and nearly equal.
    """
    return segment_sums(logprobs - sampler_logprobs, response_ids, num_rollouts)


def losses(
    logprobs: Float[Array, "B T"], rows: TrainBatch, options: RegressionOptions, tokens_per_rollout: Float[Array, ""]
) -> Float[Array, "B M"]:
    """(beta2 * log(pi / pi_sampler) - A*)^2 of each rollout, Eq. 3."""
    with jax.named_scope("oapl"):
        ratios = log_ratios(logprobs, rows.sampler_logprobs, rows.response_ids, rows.advantages.shape[1])
        return jnp.square(options.beta2 * ratios - rows.advantages)


OBJECTIVE = Objective(
    name="oapl",
    advantages=lambda rewards, is_correct, options: advantages(rewards, options.beta1),
    losses=losses,
    options=OaplOptions,
)
