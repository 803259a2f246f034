import itertools
import math
import operator
from fractions import Fraction

import numpy as np
import pytest

from oapl_jax.evaluation import passk


def enumerated(n: int, c: int, k: int) -> Fraction:
    """The share of all k-subsets of n samples with at least one of the c correct ones, by enumeration."""
    subsets = list(itertools.combinations(range(n), k))
    return Fraction(sum(min(subset) < c for subset in subsets), len(subsets))


@pytest.mark.parametrize("n", range(1, 13))
def test_equals_the_enumeration_of_all_subsets(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        (estimate,) = passk.pass_at_k(np.array([n]), np.array([c]), k)
        assert estimate == pytest.approx(float(enumerated(n, c, k)), abs=1e-15)


@pytest.mark.parametrize(
    ("n", "c", "k"), [(1024, 1, 512), (1024, 3, 64), (4096, 40, 100), (1000, 999, 1), (2000, 7, 2000)]
)
def test_equals_exact_binomials_where_floats_would_overflow(n, c, k):
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    (estimate,) = passk.pass_at_k(np.array([n]), np.array([c]), k)
    assert estimate == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("n", range(1, 13))
def test_all_ks_at_once_equal_the_enumeration(n):
    table = passk.pass_at_ks(np.full(n + 1, n), np.arange(n + 1), n)
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        assert table[c, k - 1] == pytest.approx(float(enumerated(n, c, k)), abs=1e-15)


def test_all_ks_of_256_samples_equal_fractions():
    """An independent implementation: one minus the chance that k draws without replacement are all wrong, as a fraction."""
    n = 256
    table = passk.pass_at_ks(np.full(n + 1, n), np.arange(n + 1), n)
    for c in range(n + 1):
        factors = [Fraction(max(n - c - k + 1, 0), n - k + 1) for k in range(1, n + 1)]
        all_wrong = list(itertools.accumulate(factors, operator.mul))
        # the complement is what is computed: near 1 it, and not pass@k, is exact to many digits
        np.testing.assert_allclose(1 - table[c], [float(share) for share in all_wrong], rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(table[c], [float(1 - share) for share in all_wrong], rtol=1e-12)


def test_problems_with_too_few_samples_have_no_value_there():
    table = passk.pass_at_ks(np.array([2, 4]), np.array([1, 4]), 4)
    np.testing.assert_array_equal(table, [[0.5, 1, np.nan, np.nan], [1, 1, 1, 1]])


def enumerated_majority(answers, correct, k):
    """The mean over all k-subsets of the samples, with ties shared; None is a sample without a vote."""
    total = Fraction(0)
    subsets = list(itertools.combinations(range(len(answers)), k))
    for subset in subsets:
        votes = [answers[i] for i in subset if answers[i] is not None]
        most = max(map(votes.count, votes), default=0)
        winners = {answer for answer in votes if votes.count(answer) == most}
        total += Fraction(len(winners & correct), max(len(winners), 1)) / len(subsets)
    return float(total)


def test_majority_equals_the_enumeration():
    answers = ["7", "7", "3", "3", "3", "5", None, None]
    votes = [(2, 1.0), (3, 0.0), (1, 0.0)]  # 7 is right
    rng = np.random.default_rng(0)
    for k in range(1, 8):
        estimate = passk.majority_at_k(votes, 2, k, rng, num_draws=20_000)
        assert estimate == pytest.approx(enumerated_majority(answers, {"7"}, k), abs=0.012)
    assert passk.majority_at_k(votes, 2, 8, rng) == 0.0  # all samples: no draw
    assert passk.majority_at_k([(2, 1.0), (2, 0.0)], 0, 4, rng) == 0.5
    assert passk.majority_at_k([], 4, 2, rng) == 0.0


def test_the_bootstrap_interval_has_the_width_of_the_mean():
    """For 400 coin tosses the interval is plus and minus 1.96 standard errors."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, (400, 1)).astype(float)
    low, high = passk.interval(passk.resampled_means(values, rng))
    error = values.std() / 20
    np.testing.assert_allclose([low[0], high[0]], values.mean() + np.array([-1.96, 1.96]) * error, atol=0.2 * error)


def test_a_problem_without_a_value_is_left_out_of_the_resampled_mean():
    values = np.array([[0.25, np.nan], [0.75, 0.5]])
    means = passk.resampled_means(values, np.random.default_rng(0))
    found = {(float(first), float(second) if second == second else None) for first, second in means}
    assert found == {(0.5, 0.5), (0.25, None), (0.75, 0.5)}


def test_problems_with_different_numbers_of_samples_do_not_disturb_one_another():
    num_samples, num_correct = np.array([4, 16, 9, 4]), np.array([0, 3, 9, 2])
    together = passk.pass_at_k(num_samples, num_correct, 4)
    alone = [passk.pass_at_k(np.array([n]), np.array([c]), 4)[0] for n, c in zip(num_samples, num_correct, strict=True)]
    np.testing.assert_array_equal(together, alone)
    assert together[0] == 0.0
    assert together[2] == 1.0


def test_is_unbiased():
    """The mean of the estimator over the binomial distribution of c is the true 1 - (1-p)^k."""
    n, k, p = 10, 4, 0.3
    estimates = passk.pass_at_k(np.full(n + 1, n), np.arange(n + 1), k)
    distribution = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    assert estimates @ np.array(distribution) == pytest.approx(1 - (1 - p) ** k, abs=1e-14)


def test_too_few_samples_name_k_and_n():
    with pytest.raises(ValueError, match=r"k=4.*problem 1 has n=3"):
        passk.pass_at_k(np.array([4, 3]), np.array([1, 1]), 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: passk.pass_at_k(np.array([4]), np.array([5]), 1), "5 correct of n=4"),
        (lambda: passk.pass_at_k(np.array([4]), np.array([-1]), 1), "-1 correct of n=4"),
        (lambda: passk.pass_at_k(np.array([4]), np.array([1]), 0), "k must be at least 1"),
        (lambda: passk.pass_at_ks(np.array([4]), np.array([5]), 1), "5 correct of n=4"),
    ],
)
def test_impossible_counts_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
