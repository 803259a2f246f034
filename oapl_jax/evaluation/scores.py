"""Computes pass@k, avg@k and maj@k with intervals from tallies, and paired differences between policies."""

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from oapl_jax.evaluation import passk
from oapl_jax.evaluation.tally import Problem, Tally

MAX_K = 256
AVERAGE = "average"
"""Name of the mean over benchmarks, which have equal weights."""
_SEED = 20_260


class Value(NamedTuple):
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


class Score(NamedTuple):
    """The result of a policy on a benchmark, or on all of them (``AVERAGE``); or its difference from a baseline."""

    label: str
    benchmark: str
    values: tuple[Value, ...]
    counts: Mapping[str, float]
    """Numbers of problems, samples and verdicts, mean response tokens, share of truncated responses; of a difference
    the number of problems that only one of the two has."""
    baseline: str = ""

    def of(self, metric: str) -> list[Value]:
        """The values of a metric, in the order of k."""
        return [value for value in self.values if value.metric == metric]


def score(label: str, tallies: Sequence[Tally]) -> list[Score]:
    """A score for each benchmark, and their average if there are several."""
    scores, draws = [], []
    for tally in tallies:
        rates = passk.pass_at_ks(tally.num_samples, tally.num_correct, min(MAX_K, int(tally.num_samples.max())))
        means = _resampled(tally.benchmark, rates)
        draws.append(means)
        values = _values("pass", np.arange(rates.shape[1]) + 1, rates, means)
        values += _by_problem("avg", tally, lambda problem, k: np.mean(problem.is_correct[:k]))
        if all(problem.votes is not None for problem in tally.problems):
            values += _by_problem("maj", tally, functools.partial(_majority, np.random.default_rng(_SEED)))
        scores.append(Score(label, tally.benchmark, tuple(values), _counts(tally)))
    return [*scores, _average(label, scores, draws)] if len(scores) > 1 else scores


def compare(label: str, tallies: Sequence[Tally], baseline: str, others: Sequence[Tally]) -> Iterator[Score]:
    """pass@k minus that of the baseline, on shared problems: both sides are resampled with the same ones."""
    theirs = {tally.benchmark: _by_id(tally) for tally in others}
    for tally in tallies:
        ours, base = _by_id(tally), theirs.get(tally.benchmark, {})
        shared = [name for name in ours if name in base]
        if not shared:
            continue
        n, c, base_n, base_c = np.array([[*ours[name], *base[name]] for name in shared]).T
        max_k = min(MAX_K, int(n.max()), int(base_n.max()))
        difference = passk.pass_at_ks(n, c, max_k) - passk.pass_at_ks(base_n, base_c, max_k)
        values = _values("difference", np.arange(max_k) + 1, difference, _resampled(tally.benchmark, difference))
        counts = {"unpaired": len(ours) + len(base) - 2 * len(shared)}
        yield Score(label, tally.benchmark, tuple(values), counts, baseline)


def shown_ks(max_k: int) -> list[int]:
    """The values of k that are shown: powers of two, and the largest k."""
    return sorted({*(2**i for i in range(max_k.bit_length())), max_k} - {0})


def _values(
    metric: str, ks: Int[np.ndarray, "K"], rates: Float[np.ndarray, "N K"], means: Float[np.ndarray, "W K"]
) -> list[Value]:
    """The mean of each column that has a value, with its interval; column i belongs to ``ks[i]``."""
    counts = (~np.isnan(rates)).sum(axis=0)
    kept = counts > 0
    low, high = passk.interval(means[:, kept])
    value = np.nanmean(rates[:, kept], axis=0)
    return [
        Value(metric, int(k), float(v), float(lo), float(hi), int(n), len(rates) - int(n))
        for k, v, lo, hi, n in zip(ks[kept], value, low, high, counts[kept], strict=True)
    ]


def _by_problem(metric: str, tally: Tally, rate: Callable[[Problem, int], Any]) -> list[Value]:
    """The values of a metric for the shown k, from its rate for a problem that has k samples."""
    ks = shown_ks(min(MAX_K, int(tally.num_samples.max())))
    rates = np.array([[rate(item, k) if len(item.is_correct) >= k else np.nan for k in ks] for item in tally.problems])
    return _values(metric, np.array(ks), rates, _resampled(tally.benchmark, rates))


def _majority(rng: np.random.Generator, problem: Problem, k: int) -> float:
    return passk.majority_at_k(problem.votes or (), problem.num_silent, k, rng)


def _average(label: str, scores: Sequence[Score], draws: Sequence[np.ndarray]) -> Score:
    """The mean over benchmarks for each k that all of them have; their problems are resampled independently."""
    values: list[Value] = []
    for k, found in enumerate(zip(*(item.of("pass") for item in scores), strict=False), start=1):
        low, high = passk.interval(np.mean([draw[:, k - 1] for draw in draws], axis=0)[:, None])
        mean = float(np.mean([value.value for value in found]))
        problems, short = sum(value.num_problems for value in found), sum(value.num_short for value in found)
        values.append(Value("pass", k, mean, float(low[0]), float(high[0]), problems, short))
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
        "response_tokens": tally.num_tokens / max(num_samples, 1),
        "truncated": tally.num_truncated / max(num_samples, 1),
    }


def _resampled(benchmark: str, rates: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "W K"]:
    """Means over resamplings that are the same for all policies and differ between benchmarks."""
    return passk.resampled_means(rates, np.random.default_rng((_SEED, zlib.crc32(benchmark.encode()))))


def _by_id(tally: Tally) -> dict[str, tuple[int, int]]:
    return {item.id: (len(item.is_correct), sum(item.is_correct)) for item in tally.problems}
