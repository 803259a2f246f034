"""The metrics of a run as curves of bounded size, and the panels that show them."""

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from oapl_jax.io import json_lines
from oapl_jax.io.storage import SharedPath

MOST_POINTS = 800
RULE = (
    f"A curve has at most {MOST_POINTS} points. Where a run has more steps, neighbouring steps share a point: their mean,"
    " with the lowest and the highest value as a band."
)
SYNC = "sync/seconds"
"""A metric that only the lines of sync steps have."""


class Curve:
    """The values of one metric, in buckets of steps. Their width doubles when there are too many."""

    def __init__(self, points: Iterable[tuple[int, float]] = ()):
        self._width = 1
        self._buckets: dict[int, list[float]] = {}
        """For each: number of values, sum of their steps, sum of the values, lowest value, highest value."""
        for step, value in points:
            self.add(step, value)

    def add(self, step: int, value: float) -> None:
        """A value; of a step that has one already, both count."""
        self._put(step // self._width, [1, step, value, value, value])
        if len(self._buckets) > MOST_POINTS:
            before, self._buckets, self._width = self._buckets, {}, 2 * self._width
            for key, bucket in before.items():
                self._put(key // 2, bucket)

    def points(self) -> dict[str, list[float]]:
        """Mean step and mean value of each bucket, and the bounds of the values where buckets have several steps."""
        buckets = [bucket for _, bucket in sorted(self._buckets.items())]
        columns = {"x": [steps / n for n, steps, *_ in buckets], "y": [values / n for n, _, values, *_ in buckets]}
        for i, name in ((3, "low"), (4, "high")):
            columns[name] = [bucket[i] for bucket in buckets] if self._width > 1 else []
        return {name: [float(f"{value:.6g}") for value in found] for name, found in columns.items()}

    def ends(self) -> tuple[float, float]:
        """Means over the first and the last tenth of the points; NaN where there are none."""
        values = self.points()["y"]
        tenth = max(1, len(values) // 10)
        return (statistics.fmean(values[:tenth]), statistics.fmean(values[-tenth:])) if values else (math.nan, math.nan)

    @property
    def total(self) -> float:
        """Sum of all values."""
        return sum(bucket[2] for bucket in self._buckets.values())

    def _put(self, key: int, bucket: list[float]) -> None:
        there = self._buckets.setdefault(key, bucket)
        if there is not bucket:
            for i in range(3):
                there[i] += bucket[i]
            there[3:] = min(there[3], bucket[3]), max(there[4], bucket[4])


class Metrics(NamedTuple):
    """What is read of a metrics.jsonl."""

    curves: dict[str, Curve]
    syncs: list[int]
    """Steps at whose end the sampler got new weights."""
    last_step: int | None


def read_metrics(path: SharedPath) -> Metrics:
    """Reads the file line by line; null, a value that is not finite, is left out.

    Raises:
        ValueError: a line is damaged, or a value is no number.
    """
    curves, syncs, last_step = dict[str, Curve](), [], None
    for line in json_lines.stream(path):
        step = last_step = line.pop("step")
        for name, value in line.items():
            if value is None:
                continue
            try:
                if type(value) not in (int, float):
                    raise TypeError
                place, number = float(step), float(value)
            except (TypeError, OverflowError):
                raise ValueError(f"{path}: step {step!r:.40}: {name} is {value!r:.40}, not a number") from None
            if math.isfinite(place + number):
                curves.setdefault(name, Curve()).add(step, number)
        if SYNC in line:
            syncs.append(step)
    return Metrics(curves, syncs, last_step)


class Panel(NamedTuple):
    """Metrics that share axes."""

    title: str
    unit: str
    metrics: dict[str, str]
    """By their short names."""


PANELS = (
    Panel("Reward of training rollouts", "mean over a batch", {
        "reward": "rollouts/reward", "pass rate": "rollouts/pass_rate", "finished ones": "rollouts/finished_reward",
        "V*": "rollouts/value",
    }),
    Panel("Held-out pass@k", "share of prompts", {f"k = {k}": f"evaluation/pass@{k}" for k in (1, 4, 16)}),
    Panel("Residual of the regression", "mean |·|, reward units", {
        "residual": "learner/residual", "advantage": "learner/advantage_abs",
    }),
    Panel("Log-ratio, learner to sampler", "nats per response", {
        "mean": "learner/log_ratio", "mean |·|": "learner/log_ratio_abs",
    }),
    Panel("Entropy of the policy", "nats per token", {"entropy": "learner/entropy"}),
    Panel("Lag of the sampler", "learner steps since the sync", {"lag": "window/lag"}),
    Panel("Response length", "tokens", {"training": "rollouts/response_tokens", "held-out": "evaluation/response_tokens"}),
    Panel("Responses and verdicts", "share of rollouts", {
        "truncated": "rollouts/truncated", "invalid": "rollouts/invalid", "equal-reward groups": "rollouts/equal_reward_groups",
    }),
    Panel("Time of a learner step", "seconds", {
        "whole step": "learner/seconds", "waiting": "learner/wait_seconds", "training": "learner/train_seconds",
    }),
    Panel("Look of the correct responses", "share of the correct ones", {
        "copied from the prompt": "rollouts/copied", "most frequent form": "rollouts/same_form",
    }),
    Panel("Work beside the learner", "seconds for each learner step", {
        "sampling": "sampler/seconds", "grading": "grader/seconds",
    }),
    Panel("Use of the device in training", "share of its peak FLOPs", {"MFU": "learner/mfu"}),
    Panel("Log-ratio: its spread", "nats per response", {
        "lowest": "learner/log_ratio_min", "5 %": "learner/log_ratio_p05", "median": "learner/log_ratio_p50",
        "95 %": "learner/log_ratio_p95",
    }),
    Panel("KL of sampler and learner", "nats per token", {"KL": "learner/kl"}),
    Panel("Effective sample size", "share of the rollouts, by weights exp(log-ratio)", {
        "effective sample size": "learner/effective_sample_size",
    }),
    Panel("Calibration", "of beta2 · log-ratio against the advantage", {"slope": "learner/fit_slope", "R²": "learner/fit_r2"}),
    Panel("Residual where A > 0", "quantiles, reward units", {
        f"{p} %": f"learner/residual_positive_p{p}" for p in (10, 50, 90)
    }),
    Panel("Residual where A < 0", "quantiles, reward units", {
        f"{p} %": f"learner/residual_negative_p{p}" for p in (10, 50, 90)
    }),
)  # fmt: skip
"""The first nine are also in the picture. The page gives every other metric a panel of its own."""
PICTURED = 9
