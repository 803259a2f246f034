"""What came of the samples of a rollout log, by benchmark and problem: counts, lengths, verdicts, votes."""

import collections
import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Int

from oapl_jax.data.catalogue import DATASETS
from oapl_jax.io.storage import SharedPath
from oapl_jax.rewards.math import answers
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.types import FinishReason, Verdict

COLUMNS = ("prompt_id", "answer", "rollout_index", "verdict", "finish_reason", "response", "token_ids")


@dataclasses.dataclass(frozen=True)
class Problem:
    """The samples of one problem, in their order."""

    id: str
    is_correct: tuple[bool, ...]
    """Of the samples whose verdict is not invalid."""
    votes: tuple[tuple[int, float], ...] | None
    """For each answer, how many samples gave it and whether it is correct (1 or 0); None: there is nothing to vote on."""
    num_silent: int
    """Samples without a vote."""


@dataclasses.dataclass(frozen=True)
class Tally:
    """What one policy made of one benchmark."""

    benchmark: str
    problems: tuple[Problem, ...]
    """By the order of their ids' numbers."""
    verdicts: dict[str, int]
    num_truncated: int
    tokens: dict[str, int]
    """Response tokens in all, by verdict."""

    @property
    def num_samples(self) -> Int[np.ndarray, "N"]:
        """N of each problem: its samples with a verdict."""
        return np.array([len(problem.is_correct) for problem in self.problems])

    @property
    def num_correct(self) -> Int[np.ndarray, "N"]:
        """C of each problem."""
        return np.array([sum(problem.is_correct) for problem in self.problems])


def versions(log: SharedPath) -> list[int]:
    """Policy versions that a rollout log has, ascending.

    Raises:
        ValueError: there is no log.
    """
    rollouts = RolloutLog(log)
    found = [version for version in rollouts.versions() if rollouts.parts(version)]
    if not found:
        raise ValueError(f"{str(log)!r} has no rollouts: no folder VERSION/part-NNNNNN.parquet in it")
    return found


def read(log: SharedPath, version: int) -> list[Tally]:
    """The tallies of a policy version, a benchmark each, by name; a benchmark is what a prompt's id begins with.

    Only the columns that count are read, a file at a time, so that a log may be larger than the memory.

    Raises:
        ValueError: a file cannot be read or lacks a column; names it.
    """
    rows: dict[str, dict[str, list[tuple]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    golds: dict[str, str] = {}
    for part in RolloutLog(log).parts(version):
        for prompt_id, answer, *sample in _samples(RolloutLog(log), version, part):
            benchmark = prompt_id.rpartition("/")[0] or prompt_id
            golds.setdefault(benchmark, answer)
            rows[benchmark][prompt_id].append(tuple(sample))
    return [_tally(name, rows[name], golds[name]) for name in sorted(rows)]


def prompt_ids(log: SharedPath, version: int) -> set[str]:
    """Prompts that a log has groups of."""
    found: set[str] = set()
    rollouts = RolloutLog(log)
    for part in rollouts.parts(version):
        found |= set(rollouts.read_columns(version, part, ["prompt_id"])["prompt_id"].to_pylist())
    return found


def _samples(log: RolloutLog, version: int, part: int) -> Iterator[tuple[Any, ...]]:
    table = log.read_columns(version, part, list(COLUMNS))
    lengths = pc.list_value_length(table["token_ids"])  # pyright: ignore[reportAttributeAccessIssue]
    columns = [table[column].to_pylist() for column in COLUMNS[:-1]]
    return zip(*columns, lengths.to_pylist(), strict=True)


def _tally(benchmark: str, rows: dict[str, list[tuple]], gold: str) -> Tally:
    verdicts, tokens, num_truncated = collections.Counter(), collections.Counter(), 0
    for _, verdict, finish_reason, _, length in itertools.chain.from_iterable(rows.values()):
        verdicts[verdict] += 1
        tokens[verdict] += length
        num_truncated += finish_reason == FinishReason.LENGTH
    has_votes = _is_mathematical(benchmark, gold)
    return Tally(
        benchmark,
        tuple(_problem(name, rows[name], has_votes) for name in sorted(rows, key=_number)),
        {verdict.value: verdicts[verdict.value] for verdict in Verdict},
        num_truncated,
        {verdict.value: tokens[verdict.value] for verdict in Verdict},
    )


def _problem(name: str, samples: Sequence[tuple], has_votes: bool) -> Problem:
    """Of the samples as they came: those of a second group of the same prompt follow those of the first."""
    judged = [sample for sample in samples if sample[1] != Verdict.INVALID]
    is_correct = tuple(verdict == Verdict.CORRECT for _, verdict, *_ in judged)
    if not has_votes:
        return Problem(name, is_correct, None, 0)
    votes: collections.Counter[str | None] = collections.Counter()
    num_correct = 0
    for _, verdict, finish_reason, response, _ in judged:
        if verdict == Verdict.CORRECT:
            num_correct += 1  # equal to the gold answer, so equal to one another, however they are written
        else:
            votes[None if finish_reason == FinishReason.LENGTH else answers.vote(response)] += 1
    num_silent = votes.pop(None, 0)
    counted = [(count, 0.0) for count in votes.values()] + ([(num_correct, 1.0)] if num_correct else [])
    return Problem(name, is_correct, tuple(counted), num_silent)


def _is_mathematical(benchmark: str, gold: str) -> bool:
    """Whether responses have answers that can be voted on: not programs, nor the toy tasks, which have no gold answer."""
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
