"""Computes pass@k, avg@k and maj@k with intervals from tallies, and paired differences between policies."""

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from oapl_jax.evaluation import passk
from oapl_jax.evaluation.tally import Tally

MAX_K = 256
AVERAGE = "average"
"""Name of the mean over benchmarks, which have equal weights."""
_SEED = 20_260


@dataclasses.dataclass(frozen=True)
class Value:
    """A number with its 95 % bootstrap interval over problems."""

    metric: str
    """``pass``, ``avg`` or ``maj`` at k samples, or ``difference`` of two pass@k."""
    k: int
    value: float
    low: float
    high: float
    num_problems: int
    """Number of problems with at least k samples; the value is their mean."""
    num_short: int = 0
    """Number of problems that are left out because they have fewer than k samples."""


@dataclasses.dataclass(frozen=True)
class Score:
    """The result of a policy on a benchmark, or on all of them (``AVERAGE``)."""

    label: str
    benchmark: str
    values: tuple[Value, ...]
    counts: dict[str, float]
    """Numbers of problems, samples and verdicts, mean response tokens, share of truncated responses."""

    def of(self, metric: str) -> list[Value]:
        """The values of a metric, in the order of k."""
        return [value for value in self.values if value.metric == metric]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """pass@k of a policy minus pass@k of a baseline, on the problems that both have."""

    label: str
    baseline: str
    benchmark: str
    values: tuple[Value, ...]
    num_unpaired: int
    """Number of problems that only one of the two has."""


def score(label: str, tallies: Sequence[Tally], max_k: int = MAX_K) -> list[Score]:
    """A score for each benchmark, and their average if there are several."""
    scores, draws = [], []
    for tally in tallies:
        rates = passk.pass_at_ks(tally.num_samples, tally.num_correct, min(max_k, int(tally.num_samples.max())))
        means = passk.resampled_means(_weights(tally.benchmark, len(rates)), rates)
        draws.append(means)
        values = [*_values("pass", rates, means), *_averages(tally, max_k), *_majorities(tally, max_k)]
        scores.append(Score(label, tally.benchmark, tuple(values), _counts(tally)))
    return [*scores, _average(label, scores, draws)] if len(scores) > 1 else scores


def compare(label: str, tallies: Sequence[Tally], baseline: str, others: Sequence[Tally]) -> list[Comparison]:
    """Paired differences of pass@k for each benchmark: both sides are resampled with the same problems."""
    theirs = {tally.benchmark: tally for tally in others}
    found = []
    for tally in tallies:
        if tally.benchmark not in theirs:
            continue
        ours, base = _by_id(tally), _by_id(theirs[tally.benchmark])
        shared = [name for name in ours if name in base]
        if not shared:
            continue
        pairs = np.array([[*ours[name], *base[name]] for name in shared])
        max_k = min(MAX_K, int(pairs[:, 0].max()), int(pairs[:, 2].max()))
        difference = passk.pass_at_ks(pairs[:, 0], pairs[:, 1], max_k) - passk.pass_at_ks(
            pairs[:, 2], pairs[:, 3], max_k
        )
        means = passk.resampled_means(_weights(tally.benchmark, len(shared)), difference)
        values = tuple(_values("difference", difference, means))
        found.append(Comparison(label, baseline, tally.benchmark, values, len(ours) + len(base) - 2 * len(shared)))
    return found


def shown_ks(max_k: int) -> list[int]:
    """The values of k that are shown: powers of two, and the largest k."""
    return sorted({*(2**i for i in range(max_k.bit_length())), max_k} - {0})


def _values(metric: str, rates: Float[np.ndarray, "N K"], means: Float[np.ndarray, "W K"]) -> list[Value]:
    """The mean of each column that has a value, with its interval."""
    counts = (~np.isnan(rates)).sum(axis=0)
    kept = counts > 0
    low, high = passk.interval(means[:, kept])
    value = np.nanmean(rates[:, kept], axis=0)
    ks = np.flatnonzero(kept) + 1
    return [
        Value(metric, int(k), float(v), float(lo), float(hi), int(n), len(rates) - int(n))
        for k, v, lo, hi, n in zip(ks, value, low, high, counts[kept], strict=True)
    ]


def _averages(tally: Tally, max_k: int) -> list[Value]:
    """avg@k: the share of correct samples among the first k of each problem."""
    ks = shown_ks(min(max_k, int(tally.num_samples.max())))
    rates = np.array(
        [
            [np.mean(problem.is_correct[:k]) if len(problem.is_correct) >= k else np.nan for k in ks]
            for problem in tally.problems
        ]
    )
    return _at(ks, "avg", rates, tally)


def _majorities(tally: Tally, max_k: int) -> list[Value]:
    """maj@k, if the responses of the benchmark have answers that can be voted on."""
    if any(problem.votes is None for problem in tally.problems):
        return []
    ks = shown_ks(min(max_k, int(tally.num_samples.max())))
    rng = np.random.default_rng(_SEED)
    rates = np.array(
        [
            [
                passk.majority_at_k(problem.votes or (), problem.num_silent, k, rng)
                if len(problem.is_correct) >= k
                else np.nan
                for k in ks
            ]
            for problem in tally.problems
        ]
    )
    return _at(ks, "maj", rates, tally)


def _at(ks: list[int], metric: str, rates: Float[np.ndarray, "N K"], tally: Tally) -> list[Value]:
    """The values of rates whose column i belongs to ``ks[i]``."""
    values = _values(metric, rates, passk.resampled_means(_weights(tally.benchmark, len(rates)), rates))
    return [dataclasses.replace(value, k=ks[value.k - 1]) for value in values]


def _average(label: str, scores: Sequence[Score], draws: Sequence[np.ndarray]) -> Score:
    """The mean over benchmarks for each k that all of them have; their problems are resampled independently."""
    values: list[Value] = []
    columns = [{value.k: value for value in item.of("pass")} for item in scores]
    for k in sorted(set.intersection(*map(set, columns))):
        means = np.mean([draw[:, k - 1] for draw in draws], axis=0)
        low, high = passk.interval(means[:, None])
        mean = float(np.mean([column[k].value for column in columns]))
        num_problems, num_short = (
            sum(getattr(column[k], name) for column in columns) for name in ("num_problems", "num_short")
        )
        values.append(Value("pass", k, mean, float(low[0]), float(high[0]), num_problems, num_short))
    names = ("response_tokens", "truncated")
    counts = {name: float(np.mean([item.counts[name] for item in scores])) for name in names}
    totals = {name: sum(item.counts[name] for item in scores) for name in scores[0].counts if name not in names}
    return Score(label, AVERAGE, tuple(values), {**totals, **counts})


def _counts(tally: Tally) -> dict[str, float]:
    num_samples = sum(tally.verdicts.values())
    return {
        "problems": len(tally.problems),
        "samples": num_samples,
        **{f"verdict_{name}": count for name, count in tally.verdicts.items()},
        "response_tokens": sum(tally.tokens.values()) / max(num_samples, 1),
        "truncated": tally.num_truncated / max(num_samples, 1),
    }


def _weights(benchmark: str, num_problems: int) -> Float[np.ndarray, "W N"]:
    """Resamplings that are the same for all policies and differ between benchmarks."""
    return passk.bootstrap_weights(num_problems, np.random.default_rng((_SEED, zlib.crc32(benchmark.encode()))))


def _by_id(tally: Tally) -> dict[str, tuple[int, int]]:
    return {item.id: (len(item.is_correct), sum(item.is_correct)) for item in tally.problems}
