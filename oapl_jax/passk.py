"""pass@k: the chance that at least one of k samples is correct, estimated without bias."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

POWERS_OF_TWO = (1, 2, 4, 8, 16, 32, 64)


def pass_at_k(num_samples: Int[np.ndarray, "N"], num_correct: Int[np.ndarray, "N"], k: int) -> Float[np.ndarray, "N"]:
    """The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, Eq. 1), one value a problem.

    With n samples of which c are correct it is ``1 - C(n-c, k) / C(n, k)``, evaluated as
    ``1 - prod_{i=n-c+1..n} (1 - k/i)`` so that no binomial coefficient can overflow.

    Args:
        num_samples: n, samples drawn per problem.
        num_correct: c, how many of them were correct.
        k: samples that one is allowed to try.

    Raises:
        ValueError: a problem has fewer than k samples, or a count of correct ones outside 0..n.
    """
    num_samples, num_correct = np.asarray(num_samples), np.asarray(num_correct)
    _check(num_samples, num_correct, k)
    factors = np.arange(1, num_samples.max(initial=0) + 1)
    in_product = (factors > (num_samples - num_correct)[:, None]) & (factors <= num_samples[:, None])
    # A factor i <= k is reached only when fewer than k samples are wrong; there pass@k is 1 exactly.
    terms = np.where(in_product, np.maximum(1.0 - k / factors, 0.0), 1.0)
    return 1.0 - terms.prod(axis=1)


def summarize(
    num_samples: Int[np.ndarray, "N"], num_correct: Int[np.ndarray, "N"], ks: Sequence[int] = POWERS_OF_TWO
) -> dict[str, float]:
    """The mean over problems for every k that all problems have samples for: ``{"pass@1": ..., "pass@2": ...}``.

    Raises:
        ValueError: there are no problems, or one has too few samples for even the smallest k.
    """
    if not len(num_samples):
        raise ValueError("pass@k of no problems: the evaluation has no prompts")
    fewest = int(np.min(num_samples))
    usable = [k for k in ks if k <= fewest] or [min(ks)]
    return {f"pass@{k}": float(pass_at_k(num_samples, num_correct, k).mean()) for k in usable}


def _check(num_samples: np.ndarray, num_correct: np.ndarray, k: int) -> None:
    if k < 1:
        raise ValueError(f"pass@{k}: k must be at least 1")
    too_few = np.flatnonzero(num_samples < k)
    if too_few.size:
        first = too_few[0]
        raise ValueError(
            f"pass@{k} needs at least k={k} samples of every problem; problem {first} has n={num_samples[first]}"
            f" ({too_few.size} such problems)"
        )
    impossible = np.flatnonzero((num_correct < 0) | (num_correct > num_samples))
    if impossible.size:
        first = impossible[0]
        raise ValueError(
            f"problem {first}: {num_correct[first]} correct of n={num_samples[first]} samples is impossible"
        )
