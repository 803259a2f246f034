"""Tallies of the samples in a rollout log, by benchmark and problem: counts, lengths, verdicts, votes."""

import collections
import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Int

from oapl_jax.data.catalogue import DATASETS
from oapl_jax.io.storage import SharedPath
from oapl_jax.rewards.math import answers
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.types import FinishReason, Verdict

COLUMNS = ["prompt_id", "answer", "verdict", "finish_reason", "response"]


class Problem(NamedTuple):
    """The samples of one problem, in their order."""

    id: str
    is_correct: tuple[bool, ...]
    """Whether each sample is correct; samples with an invalid verdict are left out."""
    votes: tuple[tuple[int, float], ...] | None
    """For each answer the number of samples with it, and 1 or 0 for correct or wrong. None: there are no votes."""
    num_silent: int
    """Number of samples without a vote."""


class Tally(NamedTuple):
    """The samples of one policy on one benchmark."""

    benchmark: str
    problems: tuple[Problem, ...]
    """In the order of the numbers in their ids."""
    verdicts: dict[str, int]
    num_truncated: int
    num_tokens: int
    """Of all responses."""

    @property
    def num_samples(self) -> Int[np.ndarray, "N"]:
        """Number of samples with a verdict, for each problem."""
        return np.array([len(problem.is_correct) for problem in self.problems])

    @property
    def num_correct(self) -> Int[np.ndarray, "N"]:
        """Number of correct samples, for each problem."""
        return np.array([sum(problem.is_correct) for problem in self.problems])


def versions(log: SharedPath) -> list[int]:
    """Policy versions in a rollout log, ascending; raises a ValueError if it has none."""
    rollouts = RolloutLog(log)
    found = [version for version in rollouts.versions() if rollouts.parts(version)]
    if not found:
        raise ValueError(f"{str(log)!r} has no rollouts: it lacks files VERSION/part-NNNNNN.parquet")
    return found


def read(log: SharedPath, version: int) -> list[Tally]:
    """A tally of a policy version for each benchmark, in the order of their names.

    A prompt's id begins with the name of its benchmark.

    Raises:
        ValueError: a file cannot be read or lacks a column, which the message names; or all verdicts are invalid.
    """
    rows: dict[str, dict[str, list[tuple]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    golds: dict[str, str] = {}
    rollouts = RolloutLog(log)
    for part in rollouts.parts(version):  # one at a time: a log may be larger than the memory
        table = rollouts.read_columns(version, part, [*COLUMNS, "token_ids"])
        lengths = pc.list_value_length(table["token_ids"])  # pyright: ignore[reportAttributeAccessIssue]
        columns = [*(table[column].to_pylist() for column in COLUMNS), lengths.to_pylist()]
        for prompt_id, answer, *sample in zip(*columns, strict=True):
            benchmark = prompt_id.rpartition("/")[0] or prompt_id
            golds.setdefault(benchmark, answer)
            rows[benchmark][prompt_id].append(tuple(sample))
    tallies = [_tally(name, rows[name], golds[name]) for name in sorted(rows)]
    if hopeless := [tally.benchmark for tally in tallies if not tally.num_samples.any()]:
        tables = [rollouts.read_columns(version, part, ["verdict_detail"]) for part in rollouts.parts(version)]
        reasons = collections.Counter(reason for table in tables for reason in table["verdict_detail"].to_pylist())
        raise ValueError(f"{log}: all verdicts of {hopeless[0]} are invalid, mostly: {reasons.most_common(1)[0][0]}")
    return tallies


def _tally(benchmark: str, rows: dict[str, list[tuple]], gold: str) -> Tally:
    verdicts, reasons, _, lengths = zip(*itertools.chain.from_iterable(rows.values()), strict=True)
    has_votes = _is_mathematical(benchmark, gold)
    return Tally(
        benchmark,
        tuple(_problem(name, rows[name], has_votes) for name in sorted(rows, key=_number)),
        {verdict.value: verdicts.count(verdict.value) for verdict in Verdict},
        reasons.count(FinishReason.LENGTH),
        sum(lengths),
    )


def _problem(name: str, samples: Sequence[tuple], has_votes: bool) -> Problem:
    """The tally of one prompt; samples of a second group follow those of the first."""
    judged = [sample for sample in samples if sample[0] != Verdict.INVALID]
    is_correct = tuple(verdict == Verdict.CORRECT for verdict, *_ in judged)
    if not has_votes:
        return Problem(name, is_correct, None, 0)
    votes = collections.Counter(
        None if finish_reason == FinishReason.LENGTH else answers.vote(response)
        for verdict, finish_reason, response, _ in judged
        if verdict != Verdict.CORRECT
    )
    num_silent, num_correct = votes.pop(None, 0), sum(is_correct)
    counted = [(count, 0.0) for count in votes.values()]
    if num_correct:  # all correct answers equal the gold answer, so they count as one
        counted.append((num_correct, 1.0))
    return Problem(name, is_correct, tuple(counted), num_silent)


def _is_mathematical(benchmark: str, gold: str) -> bool:
    """Whether responses have answers that can be voted on, unlike programs and responses of the toy tasks."""
    name = benchmark.partition("/")[0]
    if name in DATASETS:
        return DATASETS[name].reward == "math"
    try:
        return bool(gold) and not isinstance(json.loads(gold), list | dict)
    except ValueError:
        return True


def _number(name: str) -> tuple[str, int, str]:
    folder, _, number = name.rpartition("/")
    return (folder, int(number), "") if number.isdigit() else (folder, -1, number)
