"""OAPL: squared regression of the log-ratio onto the optimal advantage (paper Eqs. 2 and 3)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def optimal_value(rewards: Float[np.ndarray, "G"], beta1: float) -> float:
    """V*(x) = beta1 * (logsumexp_i(r_i / beta1) - log G), Eq. 2, in float64.

    Shifted by the largest reward before exponentiating, so that r / beta1 of 1e4 is as exact as
    of 1. beta1 -> 0 gives max r, beta1 -> inf gives mean r.

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
    logprobs: Float[Array, "B T"], sampler_logprobs: Float[Array, "B T"], response_mask: Bool[Array, "B T"]
) -> Float[Array, "B"]:
    """log(pi(y|x) / pi_sampler(y|x)) in nats: the sum over response tokens, float32.

    The difference is taken per token before the sum: both sums are large and nearly equal.
    """
    return jnp.where(response_mask, logprobs - sampler_logprobs, 0.0).astype(jnp.float32).sum(axis=-1)


def sequence_losses(
    logprobs: Float[Array, "B T"],
    sampler_logprobs: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    advantages: Float[Array, "B"],
    *,
    beta2: float,
) -> Float[Array, "B"]:
    """(beta2 * log(pi / pi_sampler) - A*)^2 of each rollout, Eq. 3; the loss is their mean over rollouts.

    Args:
        logprobs: the learner's; ``[:, t]`` scores token t. Values outside the mask are ignored, even NaN.
        sampler_logprobs: of the law that was sampled.
        response_mask: True at response tokens, the stop token included.
        advantages: A* of each rollout.
        beta2: weight of the log-ratio.
    """
    with jax.named_scope("oapl"):
        return jnp.square(beta2 * log_ratios(logprobs, sampler_logprobs, response_mask) - advantages)
