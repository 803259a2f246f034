"""How far the learner is from the sampler on a batch, and how well it fits the advantages; on the host, in float64."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from oapl_jax.learner.step import TokenScores
from oapl_jax.types import Metrics, TrainBatch

TOKEN_PERCENTILES, ROLLOUT_PERCENTILES, RESIDUAL_PERCENTILES = (1, 50, 99), (5, 50, 95), (10, 50, 90)
"""A batch has many tokens and some dozens of rollouts, which the sign of the advantage halves."""


def measure(batch: TrainBatch, scores: TokenScores, beta2: float) -> Metrics:
    """The ``learner/*`` metrics of the log-probabilities of a batch (docs/metrics.md has the formulas).

    Args:
        batch: on the host, ``[B, ...]``.
        scores: of the train step on it, on the host.
        beta2: weight of the log-ratio in the residual (paper Eq. 3).
    """
    num_places, is_rollout = batch.segment_mask.shape[1], batch.segment_mask.ravel()
    places = np.flatnonzero(batch.response_mask)
    owners = places // batch.tokens.shape[1] * num_places + batch.segment_ids.ravel()[places] - 1

    def of_tokens(values: np.ndarray) -> Float[np.ndarray, "_N"]:
        return values.ravel()[places].astype(np.float64)

    def of_rollouts(values: Float[np.ndarray, "_N"]) -> Float[np.ndarray, "_R"]:
        return np.bincount(owners, values, len(is_rollout))[is_rollout].astype(np.float64)  # integers of no tokens

    token_ratios = of_tokens(scores.logprobs) - of_tokens(batch.sampler_logprobs)
    log_ratios = of_rollouts(token_ratios)
    advantages = batch.advantages.ravel()[is_rollout].astype(np.float64)
    residuals = beta2 * log_ratios - advantages
    metrics = {
        **_spread("learner/token_log_ratio", token_ratios, TOKEN_PERCENTILES),
        **_spread("learner/log_ratio", log_ratios, ROLLOUT_PERCENTILES),
        "learner/log_ratio_abs": np.abs(log_ratios).mean(),
        "learner/log_ratio_min": log_ratios.min(),
        "learner/effective_sample_size": _effective_sample_size(log_ratios),
        "learner/sequence_entropy": of_rollouts(of_tokens(scores.entropy)).mean(),
        "learner/advantage_abs": np.abs(advantages).mean(),
        "learner/residual": np.abs(residuals).mean(),
        **_percentiles("learner/residual_positive", residuals[advantages > 0], RESIDUAL_PERCENTILES),
        **_percentiles("learner/residual_negative", residuals[advantages < 0], RESIDUAL_PERCENTILES),
        **_fit(advantages, beta2 * log_ratios),
    }
    if len(token_ratios):
        with np.errstate(over="ignore"):
            metrics["learner/kl"] = (np.expm1(token_ratios) - token_ratios).mean()
        if scores.is_clipped is not None:
            metrics["learner/clipped"] = of_tokens(scores.is_clipped).mean()
    return {name: float(value) for name, value in metrics.items()}


def _effective_sample_size(log_ratios: Float[np.ndarray, "_R"]) -> float:
    """(sum w)^2 / (R sum w^2) of the importance weights w = exp(log-ratio), whose common factor cancels: 1/R to 1."""
    weights = np.exp(log_ratios - log_ratios.max())
    return weights.sum() ** 2 / (len(weights) * np.square(weights).sum())


def _fit(advantages: Float[np.ndarray, "_R"], fitted: Float[np.ndarray, "_R"]) -> Metrics:
    """Slope and R^2 of the least-squares line of beta2 * log-ratio over the advantage; nothing where there is no line."""
    (variance, covariance), (_, variance_fitted) = np.cov(advantages, fitted, ddof=0)
    slope = {"learner/fit_slope": covariance / variance} if variance else {}
    return slope | (
        {"learner/fit_r2": covariance**2 / (variance * variance_fitted)} if variance * variance_fitted else {}
    )


def _spread(name: str, values: Float[np.ndarray, "_N"], percentiles: Sequence[int]) -> Metrics:
    """Mean, standard deviation and percentiles; nothing where there are no values."""
    moments = {name: values.mean(), f"{name}_std": values.std()} if len(values) else {}
    return moments | _percentiles(name, values, percentiles)


def _percentiles(name: str, values: Float[np.ndarray, "_N"], percentiles: Sequence[int]) -> Metrics:
    found = np.percentile(values, percentiles) if len(values) else ()
    return {f"{name}_p{percent:02}": value for percent, value in zip(percentiles, found, strict=False)}
