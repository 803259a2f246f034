"""Which rollouts of a log a page shows, and counts of all: the log is read file by file, in bounded memory."""

import collections
import dataclasses
import functools
import heapq
import itertools
import math
import re
import zlib
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import pyarrow as pa

from oapl_jax.io.storage import SharedPath
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.schema import COLUMNS, is_kind
from oapl_jax.types import FinishReason, RolloutGroup, Verdict
from oapl_jax.untrusted.parquet import Limits

MOST_ROLLOUTS = 2000
_KEPT = 500
"""Most candidates of a stratum that are kept."""
_RANGES, _SPANS = 16, 60
"""Parts of the versions, of equal length: as strata, and in the table of counts."""
LIMITS = Limits(2**20, 2**30)
"""Of one file of the log."""
_COLUMNS = ["group_id", "verdict", "verdict_detail", "reward", "finish_reason", "value"]
_MOST_REASONS, _SHOWN_REASONS = 10_000, 12

RULE = (
    f"Shown are at most {MOST_ROLLOUTS:,} rollouts, in whole groups. The strata are {_RANGES} equal parts of the policy"
    " versions, each split by verdict and by reward (below 0, quarters of 0 to 1, 1 and above). They take turns; each gives"
    " the group with one of its rollouts whose id has the smallest CRC-32, so that the same log gives the same choice. Groups whose token log-probabilities are recorded come first."
)


class Place(NamedTuple):
    """A file of the log."""

    version: int
    part: int


class Candidate(NamedTuple):
    """A group that may be shown; candidates are compared by ``order``."""

    order: int
    """CRC-32 of the id, negative: a heap has its smallest element at hand, and the largest CRC is to leave."""
    id: str
    size: int
    place: Place


@dataclasses.dataclass
class Counts:
    """Of the rollouts of some neighbouring versions."""

    versions: tuple[int, int]
    """The first and the last."""
    groups: int = 0
    none_correct: int = 0
    all_correct: int = 0
    """Of the groups."""
    rollouts: int = 0
    correct: int = 0
    invalid: int = 0
    truncated: int = 0
    reward: float = 0.0
    """Sum over the rollouts that have one."""
    value: float = 0.0
    """Sum of V* over the groups that have one."""
    num_values: int = 0


@dataclasses.dataclass
class LogRecord:
    """What a page shows of a log."""

    counts: list[Counts]
    reasons: list[tuple[str, str, int]]
    """Verdict, its reason with each number as ``#``, and how many rollouts have it; the most frequent first."""
    groups: list[RolloutGroup]
    damaged: list[str]
    """Why files could not be read."""


class _Row(NamedTuple):
    group_id: str
    verdict: str
    detail: str
    reward: float | None
    finish: str
    value: float | None


class Reservoir:
    """Candidates by stratum, of each the groups with the smallest CRC-32."""

    def __init__(self, wanted: Collection[str] = ()):
        """``wanted``: ids of groups that are chosen first, up to half of the rollouts."""
        self._wanted, self._found = wanted, list[Candidate]()
        self._strata: dict[tuple, list[Candidate]] = collections.defaultdict(list)

    def add(self, rows: list[_Row], place: Place, position: float) -> None:
        """A group; ``position`` from 0 to 1 is that of its version among all."""
        name = str(rows[0].group_id)
        candidate = Candidate(-zlib.crc32(name.encode()), name, len(rows), place)
        if name in self._wanted:
            self._found.append(candidate)
        for stratum in {(int(position * _RANGES), row.verdict, _bin(row.reward)) for row in rows}:
            heap = self._strata[stratum]
            (heapq.heappush if len(heap) < _KEPT else heapq.heappushpop)(heap, candidate)

    def choose(self, most_rollouts: int) -> dict[Place, set[str]]:
        """Ids of the chosen groups by file: the strata take turns."""
        chosen: dict[Place, set[str]] = collections.defaultdict(set)
        num_rollouts, is_chosen = 0, set[str]()

        def take(item: Candidate, most: int) -> bool:
            """Chooses a group that is new and fits."""
            nonlocal num_rollouts
            if item.id in is_chosen or num_rollouts + item.size > most:
                return False
            chosen[item.place].add(item.id)
            is_chosen.add(item.id)
            num_rollouts += item.size
            return True

        for item in sorted(self._found, reverse=True):
            take(item, most_rollouts // 2)
        queues = collections.deque(iter(sorted(self._strata[key], reverse=True)) for key in sorted(self._strata))
        while queues:
            queue = queues.popleft()
            if any(take(item, most_rollouts) for item in queue):
                queues.append(queue)
        return chosen


def read_log(directory: SharedPath, most_rollouts: int = MOST_ROLLOUTS, wanted: Collection[str] = ()) -> LogRecord:
    """Counts all rollouts of a log, and reads those to be shown; a file that cannot be read is left out and named.

    ``wanted`` are ids of groups that are shown first.
    """
    log, damaged = RolloutLog(directory), list[str]()
    reservoir, reasons, spans = Reservoir(wanted), collections.Counter[tuple[str, str]](), dict[int, Counts]()
    versions = _try(directory, log.versions, damaged) or []
    places = [(Place(v, part), i / len(versions)) for i, v in enumerate(versions) for part in log.parts(v)]
    for place, position in places:
        table = _try(log.path(*place), functools.partial(_rows, log, place), damaged) or []
        counts = spans.setdefault(int(position * _SPANS), Counts((place.version, place.version)))
        counts.versions = (counts.versions[0], place.version)
        for _, members in itertools.groupby(table, key=lambda row: row.group_id):
            rows = list(members)
            _count(counts, rows)
            reasons.update((row.verdict, _kind(row.detail)) for row in rows)
            reservoir.add(rows, place, position)
        if len(reasons) > _MOST_REASONS:
            reasons = collections.Counter(dict(reasons.most_common(_MOST_REASONS // 10)))
    groups = []
    for place, names in sorted(reservoir.choose(most_rollouts).items()):
        found = _try(log.path(*place), functools.partial(log.read_part, *place, LIMITS), damaged) or []
        groups += [group for group in found if group.id in names]
    counted = [(*reason, count) for reason, count in reasons.most_common(_SHOWN_REASONS)]
    return LogRecord([counts for counts in spans.values() if counts.groups], counted, groups, damaged)


def _rows(log: RolloutLog, place: Place) -> list[_Row]:
    """The columns that are counted, of a file; raises a ValueError where a value is not what the schema says."""
    table = log.read_columns(*place, _COLUMNS, LIMITS)
    for name in _COLUMNS:
        if not (is_kind(table[name].type, COLUMNS[name].type) or pa.types.is_null(table[name].type)):
            raise ValueError(f"column {name} is {table[name].type}")
    columns = {name: table[name].to_pylist() for name in _COLUMNS}
    if not ({*columns["verdict"]} <= {*Verdict} and {*columns["finish_reason"]} <= {*FinishReason}):
        raise ValueError("has unknown verdicts or finish reasons")
    return list(itertools.starmap(_Row, zip(*columns.values(), strict=True)))


@functools.lru_cache(maxsize=4096)
def _kind(detail: str | None) -> str:
    """The reason of a verdict with each number as ``#``."""
    return re.sub(r"\d+", "#", (detail or "")[:160])


def _bin(reward: float | None) -> int:
    return -2 if reward is None or math.isnan(reward) else int(max(-1, min(4, 4 * reward)) // 1)


def _count(counts: Counts, rows: list[_Row]) -> None:
    """Adds a group."""
    correct = sum(row.verdict == Verdict.CORRECT for row in rows)
    counts.groups += 1
    counts.none_correct += correct == 0
    counts.all_correct += correct == len(rows)
    counts.rollouts += len(rows)
    counts.correct += correct
    counts.invalid += sum(row.verdict == Verdict.INVALID for row in rows)
    counts.truncated += sum(row.finish == FinishReason.LENGTH for row in rows)
    counts.reward += sum(row.reward for row in rows if row.reward is not None and math.isfinite(row.reward))
    if rows[0].value is not None and math.isfinite(rows[0].value):
        counts.value += rows[0].value
        counts.num_values += 1


def _try(path: object, read: Callable[[], Any], damaged: list[str]) -> Any:
    """What ``read`` returns; None, and the reason among ``damaged``, where it cannot."""
    try:
        return read()
    except (ValueError, OSError) as error:  # the page has more than this file
        reason = f"{path}: {str(error).removeprefix(f'{path}: ')}"
        if reason not in damaged:
            damaged.append(reason)
        return None
