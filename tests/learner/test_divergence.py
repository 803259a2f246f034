"""Metrics of the log-probabilities of a batch, by hand."""

import math

import numpy as np
import pytest

from oapl_jax.learner.divergence import measure
from oapl_jax.learner.step import TokenScores
from oapl_jax.types import TrainBatch

LN2 = math.log(2)
IDS = np.array([[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]], np.int32)
RESPONSES = np.array([[0, 1, 1, 1, 1], [0, 0, 1, 1, 0]], bool)
LOG_RATIOS = LN2 * np.array([[9, 1, 1, 0, -1], [9, 9, 0, 0, 9]])
"""Of three rollouts: ln 2 + ln 2, 0 - ln 2, 0 + 0; the nines stand outside the responses."""
ADVANTAGES = np.array([[1.0, -1.0], [0.0, 9.0]])


def make_batch(log_ratios=LOG_RATIOS, advantages=ADVANTAGES, is_clipped=None):
    """Three rollouts packed in two rows, and what the train step finds at their tokens, in two micro-batches."""
    sampler = np.where(RESPONSES, -1.5, np.nan).astype(np.float32)
    batch = TrainBatch(
        IDS, IDS, IDS, RESPONSES, sampler, advantages.astype(np.float32), np.array([[True, True], [True, False]])
    )
    entropy = np.array([[9, 0.5, 0.5, 1, 0], [9, 9, 2, 1, 9]], np.float32)
    found = (log_ratios - 1.5).astype(np.float32), entropy, is_clipped
    return batch, TokenScores(*(None if array is None else array[:, None] for array in found))


def test_all_metrics_by_hand():
    is_clipped = np.array([[1, 1, 0, 1, 0], [1, 1, 0, 0, 1]], bool)
    assert measure(*make_batch(is_clipped=is_clipped), beta2=0.5) == pytest.approx(
        {
            "learner/token_log_ratio": LN2 / 6,
            "learner/token_log_ratio_std": LN2 * math.sqrt(3 / 6 - 1 / 36),
            "learner/token_log_ratio_p01": -0.95 * LN2,  # of -1, 0, 0, 0, 1, 1
            "learner/token_log_ratio_p50": 0,
            "learner/token_log_ratio_p99": LN2,
            "learner/kl": (2 * (2 - 1 - LN2) + (0.5 - 1 + LN2)) / 6,
            "learner/log_ratio": LN2 / 3,
            "learner/log_ratio_std": LN2 * math.sqrt(5 / 3 - 1 / 9),
            "learner/log_ratio_p05": -0.9 * LN2,  # of -1, 0, 2
            "learner/log_ratio_p50": 0,
            "learner/log_ratio_p95": 1.8 * LN2,
            "learner/log_ratio_abs": LN2,
            "learner/log_ratio_min": -LN2,
            "learner/effective_sample_size": (4 + 0.5 + 1) ** 2 / (3 * (16 + 0.25 + 1)),
            "learner/sequence_entropy": (1 + 1 + 3) / 3,
            "learner/advantage_abs": 2 / 3,
            "learner/residual": ((1 - LN2) + (1 - 0.5 * LN2)) / 3,
            **{f"learner/residual_positive_p{percent}": LN2 - 1 for percent in (10, 50, 90)},
            **{f"learner/residual_negative_p{percent}": 1 - 0.5 * LN2 for percent in (10, 50, 90)},
            "learner/fit_slope": 0.75 * LN2,  # through (1, ln 2), (-1, -ln 2 / 2), (0, 0)
            "learner/fit_r2": 27 / 28,
            "learner/clipped": 2 / 6,
        },
        rel=1e-6,
        abs=1e-7,
    )


def test_a_fitted_regression_has_slope_one_and_no_residual():
    log_ratios = np.array([[0, 1, 0.5, -1, -2], [0, 0, 0, 0.5, 0]])
    metrics = measure(*make_batch(log_ratios, np.array([[0.75, -1.5], [0.25, 0]])), beta2=0.5)
    for name, value in {"fit_slope": 1, "fit_r2": 1, "residual": 0, "residual_negative_p50": 0}.items():
        assert metrics[f"learner/{name}"] == pytest.approx(value, abs=1e-6), name
    assert "learner/clipped" not in metrics


def test_what_is_not_defined_is_left_out():
    at_sync = measure(*make_batch(0 * LOG_RATIOS), beta2=0.5)
    assert (at_sync["learner/fit_slope"], at_sync["learner/effective_sample_size"], at_sync["learner/kl"]) == (0, 1, 0)
    assert "learner/fit_r2" not in at_sync
    equal_rewards = measure(*make_batch(advantages=0 * ADVANTAGES), beta2=0.5)
    assert not [name for name in equal_rewards if "fit" in name or "positive" in name or "negative" in name]
