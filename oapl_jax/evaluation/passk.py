"""pass@k, maj@k, and bootstrap intervals of their means over problems."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

NUM_RESAMPLINGS = 4000
TAIL = (1 - 0.95) / 2
"""Share of the resampled means on each side of a 95 % interval."""


def pass_at_k(num_samples: Int[np.ndarray, "N"], num_correct: Int[np.ndarray, "N"], k: int) -> Float[np.ndarray, "N"]:
    """The unbiased estimator of pass@k, one value per problem (Chen et al. 2021, arXiv 2107.03374, Eq. 1).

    For n samples, c of them correct, it is ``1 - C(n-c, k) / C(n, k)``.

    Raises:
        ValueError: k is below 1, a problem has fewer than k samples, or c is outside 0..n.
    """
    if k < 1:
        raise ValueError(f"pass@{k}: k must be at least 1")
    _check(num_samples, num_correct, k)
    return pass_at_ks(num_samples, num_correct, k)[:, -1]


def _check(num_samples: np.ndarray, num_correct: np.ndarray, k: int) -> None:
    for i, (n, c) in enumerate(zip(num_samples, num_correct, strict=True)):
        if n < k:
            raise ValueError(f"pass@{k} needs at least k={k} samples of every problem; problem {i} has n={n}")
        if not 0 <= c <= n:
            raise ValueError(f"problem {i}: {c} correct of n={n} samples is impossible")


def pass_at_ks(
    num_samples: Int[np.ndarray, "N"], num_correct: Int[np.ndarray, "N"], max_k: int
) -> Float[np.ndarray, "N max_k"]:
    """pass@1 ... pass@max_k of every problem; NaN where a problem has fewer than k samples.

    ``1 - pass@k = prod_{j<k} (n-c-j) / (n-j)`` is the chance that k samples drawn without replacement are all wrong.
    Every factor is between 0 and 1, so the product cannot overflow, and a cumulative product gives all k.

    Raises:
        ValueError: a number of correct samples is outside 0..n.
    """
    _check(num_samples, num_correct, 0)
    samples, correct = num_samples[:, None], num_correct[:, None]
    drawn = np.arange(max_k)
    left = np.maximum(samples - drawn, 1)
    all_wrong = np.cumprod(np.clip((samples - correct - drawn) / left, 0.0, 1.0), axis=1)
    return np.where(drawn < samples, 1.0 - all_wrong, np.nan)


def majority_at_k(
    votes: Sequence[tuple[int, float]], num_silent: int, k: int, rng: np.random.Generator, num_draws: int = 200
) -> float:
    """maj@k of one problem: the chance that the answer with the most votes among k samples is correct, ties at random.

    Args:
        votes: for each answer the number of samples with it, and the share of these that are correct.
        num_silent: number of samples without an answer, which do not vote.
        k: number of samples. If there are more, the result is the mean over ``num_draws`` random choices of k.
        rng: generator of the random choices.
        num_draws: number of random choices.
    """
    if not votes:
        return 0.0
    counts, correct = np.array([count for count, _ in votes]), np.array([share for _, share in votes])
    if k < counts.sum() + num_silent:
        chosen = rng.multivariate_hypergeometric([*counts, num_silent], k, size=num_draws, method="marginals")[:, :-1]
    else:
        chosen = counts[None]
    wins = (chosen == chosen.max(axis=1, keepdims=True)) & (chosen > 0)
    return float(((wins @ correct) / np.maximum(wins.sum(axis=1), 1)).mean())


def resampled_means(values: Float[np.ndarray, "N K"], rng: np.random.Generator) -> Float[np.ndarray, "W K"]:
    """The mean of each column over each of many bootstrap resamplings of the rows, without NaN values."""
    num_problems, is_known = len(values), ~np.isnan(values)
    weights = rng.multinomial(num_problems, np.full(num_problems, 1 / num_problems), NUM_RESAMPLINGS).astype(np.float64)
    total = weights @ is_known
    return np.where(total > 0, weights @ np.where(is_known, values, 0.0) / np.maximum(total, 1e-300), np.nan)


def interval(means: Float[np.ndarray, "W K"]) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % percentile interval of each column, without resamplings whose mean is NaN."""
    low, high = np.nanquantile(means, [TAIL, 1 - TAIL], axis=0)
    return low, high
