"""One process's share of a work that is to be generated: groups, file by file, into a rollout log.

The work is cut into files of a few groups. A process claims files, samples and grades their groups, and
creates each file whole under a number that only its place in the work decides: whatever is killed, and
whoever does it twice, a group is in the log once. Leases keep processes from doing the same work.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import Any

from oapl_jax.io import storage
from oapl_jax.io.lease import Lease, Leases
from oapl_jax.rollouts.buffer import Ticket
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import Request, SamplingDistribution
from oapl_jax.sampler.engine import Engine
from oapl_jax.sampler.replicas import Replicas
from oapl_jax.sources.local import GroupMaker
from oapl_jax.types import Prompt, Rollout

POLL_SECONDS = 0.5
MAX_UNGRADED_FILES = 64
"""Sampled files that may wait for the grader before the sampler waits too."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What is to be generated: group ``i`` answers prompt ``i``."""

    log: RolloutLog
    version: int
    prompts: Sequence[Prompt]
    groups_per_file: int

    @property
    def num_files(self) -> int:
        """Files of the whole work."""
        return -(-len(self.prompts) // self.groups_per_file)

    def groups_of(self, file: int) -> range:
        """Indices of the groups of a file."""
        start = file * self.groups_per_file
        return range(start, min(start + self.groups_per_file, len(self.prompts)))

    def is_done(self, file: int) -> bool:
        """Whether a file is in the log."""
        return storage.exists(self.log.path(self.version, file))


@dataclasses.dataclass
class _Open:
    """A claimed file whose groups are being sampled."""

    lease: Lease
    rollouts: dict[int, list[Rollout]] = dataclasses.field(default_factory=dict)


class Generator:
    """Does its share of a work in this process.

    Args:
        work: the same in all processes.
        leases: in a folder that all processes share.
        engines: the sampler's programs.
        params: the policy, on the engines' mesh.
        make_groups: decodes and grades.
        sampling: the distribution.
        group_size: responses a prompt.
        seed: root of all draws; group ``i`` of version ``v`` draws from ``(seed, v, i)``.
        device_lock: see ``Scheduler``.
        deadline: seconds to wait for files of other processes.
    """

    def __init__(
        self,
        work: Work,
        leases: Leases,
        engines: Sequence[Engine],
        params: Any,
        make_groups: GroupMaker,
        *,
        sampling: SamplingDistribution,
        group_size: int,
        seed: int,
        device_lock: AbstractContextManager,
        deadline: float,
    ):
        self._work, self._leases, self._params, self._make_groups = work, leases, params, make_groups
        self._replicas: Replicas[tuple[int, int]] = Replicas(engines, device_lock, fixed_shapes=True)
        self._sampling, self._group_size, self._seed = sampling, group_size, seed
        self._deadline = deadline
        self._missing: collections.deque[int] = collections.deque(range(work.num_files))
        self._next_scan = 0.0
        """When to look again for a file that can be claimed, after a look that found none."""
        self._open: dict[int, _Open] = {}
        self._grading: collections.deque[Future[None]] = collections.deque()
        self.num_tokens = 0
        """Response tokens that this process has sampled."""

    def run(self, report: Callable[[int], None], is_stopped: Callable[[], bool]) -> bool:
        """Generates until every file is in the log, or until it is stopped.

        Args:
            report: told the number of groups that are in the log, every now and then.
            is_stopped: looked at after every chunk.

        Returns:
            Whether every file is in the log.

        Raises:
            TimeoutError: other processes hold what is missing and finish nothing.
        """
        last_change = time.monotonic()
        pool = ThreadPoolExecutor(1, "grader")
        try:
            while not is_stopped():
                self._claim()
                if not self._replicas.is_idle:
                    for (file, index), rollouts in self._replicas.step(self._params):
                        self._collect(file, index, rollouts, pool)
                if self._settle_grading():
                    last_change = time.monotonic()
                report(self._count_done())
                if not self._missing and not self._open and not self._grading:
                    return True
                if self._replicas.is_idle:
                    self._wait(last_change)
            return False
        finally:
            pool.shutdown(cancel_futures=True)

    def _claim(self) -> None:
        """Claims files while the sampler could use more prompts; forgets those that are done."""
        if time.monotonic() < self._next_scan:
            return
        for _ in range(len(self._missing)):
            if not self._replicas.wants_more or len(self._grading) >= MAX_UNGRADED_FILES:
                return
            file = self._missing.popleft()
            if self._work.is_done(file):
                continue
            lease = self._leases.claim(_name(self._work.version, file))
            if lease is None:
                self._missing.append(file)
            elif self._work.is_done(file):  # finished between the two looks
                lease.release()
            else:
                self._open[file] = _Open(lease)
                for index in self._work.groups_of(file):
                    self._submit(file, index)
        self._next_scan = time.monotonic() + POLL_SECONDS

    def _submit(self, file: int, index: int) -> None:
        prompt = self._work.prompts[index]
        seed = (self._seed, self._work.version, index)
        self._replicas.submit(Request((file, index), prompt.token_ids, self._group_size, seed, self._sampling))

    def _collect(self, file: int, index: int, rollouts: list[Rollout], pool: ThreadPoolExecutor) -> None:
        """Keeps a finished group; the last of its file sends the file to the grader."""
        self.num_tokens += sum(len(rollout.token_ids) for rollout in rollouts)
        self._open[file].rollouts[index] = rollouts
        if len(self._open[file].rollouts) == len(self._work.groups_of(file)):
            self._grading.append(pool.submit(self._finish, file, self._open.pop(file)))

    def _finish(self, file: int, done: _Open) -> None:
        """Grades and logs a file, in the grader's thread.

        A process that has lost its lease tries all the same: only one file of a number can be created.
        """
        work = self._work
        items = [
            (Ticket(work.version, index, index), work.prompts[index], done.rollouts[index])
            for index in work.groups_of(file)
        ]
        work.log.create(file, self._make_groups(items))
        done.lease.release()

    def _settle_grading(self) -> bool:
        """Takes note of what the grader has finished; raises what it raised."""
        is_any = False
        while self._grading and (self._grading[0].done() or len(self._grading) >= MAX_UNGRADED_FILES):
            self._grading.popleft().result()
            is_any = True
        return is_any

    def _count_done(self) -> int:
        own = len(self._open) + sum(not future.done() for future in self._grading)
        missing = (len(self._missing) + own) * self._work.groups_per_file
        return max(0, len(self._work.prompts) - missing)

    def _wait(self, last_change: float) -> None:
        """For the grader, or for files of other processes."""
        if self._grading:
            wait([self._grading[0]], POLL_SECONDS)
            return
        if time.monotonic() - last_change > self._deadline:
            raise TimeoutError(
                f"{len(self._missing)} files of policy version {self._work.version} are claimed by other processes, and"
                f" none was finished for {self._deadline:g} s (generation.deadline); do those processes still run? The"
                f" first is file {self._missing[0]}"
            )
        time.sleep(POLL_SECONDS)


def _name(version: int, file: int) -> str:
    return f"generate-{version:06d}-{file:06d}"
