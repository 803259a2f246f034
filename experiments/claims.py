"""Whether a claim holds: paired differences over the runs of two arms, and a verdict in a word."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from experiments.grid import Claim
from experiments.records import Record

Verdict = Literal["reproduced", "partly", "not reproduced", "not resolvable"]
Pair = tuple[int, int]


class Difference(NamedTuple):
    """Left minus right in one metric, over the pairs that both arms have."""

    metric: str
    left: tuple[float, float]
    """Mean and standard error."""
    right: tuple[float, float]
    differences: tuple[float, ...]
    """Of each pair."""

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the mean difference, by Student's t over the pairs; infinite with one pair."""
        mean, error = mean_and_error(self.differences)
        half = float(stats.t.ppf(0.975, len(self.differences) - 1)) * error if math.isfinite(error) else math.inf
        return mean - half, mean + half

    @property
    def mean(self) -> float:
        """The mean difference."""
        return float(np.mean(self.differences))

    @property
    def verdict(self) -> Verdict:
        """Of this metric alone: the sign must be the same in every pair, and the interval must leave 0 out."""
        low, high = self.interval
        if low > 0 and min(self.differences) > 0:
            return "reproduced"
        if high < 0 and max(self.differences) < 0:
            return "not reproduced"
        return "not resolvable"


def examine(claim: Claim, records: Mapping[str, Mapping[Pair, Record]]) -> list[Difference]:
    """The difference in each metric of a claim; none where no pair is in both arms."""
    left, right = records.get(claim.left.arm, {}), records.get(claim.right.arm, {})
    pairs = [pair for pair in left if pair in right]
    found = []
    for metric in claim.metrics if pairs else ():
        ours = [left[pair].value(metric, claim.left.at) for pair in pairs]
        theirs = [right[pair].value(metric, claim.right.at) for pair in pairs]
        differences = tuple(float(a - b) for a, b in zip(ours, theirs, strict=True))
        found.append(Difference(metric, mean_and_error(ours), mean_and_error(theirs), differences))
    return found


def verdict(differences: Sequence[Difference]) -> Verdict:
    """Of a whole claim: reproduced in all metrics; partly, in some and reversed in none; not, reversed in one or more."""
    verdicts = {difference.verdict for difference in differences}
    if "not reproduced" in verdicts:
        return "not reproduced"
    if "reproduced" not in verdicts:
        return "not resolvable"
    return "reproduced" if len(verdicts) == 1 else "partly"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; infinite for one value."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return float(np.mean(values)), error
