"""The groups of a window in shards, which several samplers share by leases.

Shard k has the groups from ``k * size`` on, and becomes file k of the rollout log, which only one process can
create. So a group is in the log once, whatever happens to leases: a sampler that was stopped and wakes up, or
two that think they hold the same lease, cost work and nothing else.
"""

import collections
import contextlib
import math
import time
from collections.abc import Callable, Sequence

from oapl_jax.io import storage
from oapl_jax.io.lease import Lease, Leases
from oapl_jax.io.terminal import say
from oapl_jax.rollouts.buffer import Changes, Ticket, Window
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.types import RolloutGroup

RETRY_SECONDS = 0.5
WRITE_DEADLINE = 600.0


class ShardQueue(Changes):
    """One sampler's tickets, and the way of its groups to the log: a sampling loop's queue and log in one.

    Args:
        log: where shards become files.
        leases: of the shards, under ``VERSION-SHARD``.
        is_accepted: which groups the learner wants; shards are claimed until the window has enough of them.
        size: groups of a shard.
        num_groups: groups that there are, where their number is fixed (a data set to be generated); None: a window may
            need more of them than it wants, because some are not accepted.
        patience: seconds that others may hold a shard without writing it; then it is sampled here too.
    """

    def __init__(
        self,
        log: RolloutLog,
        leases: Leases,
        is_accepted: Callable[[RolloutGroup], bool],
        size: int,
        num_groups: int | None = None,
        patience: float = math.inf,
    ):
        super().__init__()
        self._log, self._leases, self._is_accepted, self._size = log, leases, is_accepted, size
        self._num_groups, self._patience = num_groups, patience
        self._window: Window | None = None
        self._num_accepted: dict[int, int] = {}  # of each file of the window's version that was seen
        self._held: dict[int, Lease] = {}
        self._graded: dict[int, dict[int, RolloutGroup]] = {}
        self._todo: collections.deque[int] = collections.deque()
        self._next_poll, self._last_news = 0.0, 0.0
        self.failure: BaseException | None = None
        self.num_written = 0
        """Groups that this process has written."""
        self.num_wasted = 0
        """Groups that it made and did not write: another was first, or the window was over."""

    def open_window(self, window: Window | None) -> None:
        """Gives the old window's shards back and begins another, or none."""
        with self._changed:
            held, self._held = self._held, {}
            self._window, self._num_accepted = window, {}
            self._next_poll, self._last_news = 0.0, time.monotonic()
            self._graded, self._todo = {}, collections.deque()
            self._notify()
        for lease in held.values():
            lease.release()

    def admit(self, policy_version: int) -> Ticket | None:
        """The next group of the shards that this process holds, of which it claims another where needed."""
        with self._changed:
            if self._window is None or policy_version != self._window.policy_version:
                return None
            if not self._todo and time.monotonic() >= self._next_poll:
                self._poll(self._window)
            if not self._todo:
                return None
            index = self._todo.popleft()
            return Ticket(policy_version, index, self._window.position(index))

    def wants_groups(self, policy_version: int) -> bool:
        """Whether groups of this version are under way."""
        with self._changed:
            return self._window is not None and policy_version == self._window.policy_version and bool(self._held)

    @property
    def num_logged(self) -> int:
        """Accepted groups of the window that were seen in the log."""
        with self._changed:
            return sum(self._num_accepted.values())

    def mark_sampled(self, ticket: Ticket) -> None:
        """Nothing: a group counts when it is graded."""

    def append(self, groups: Sequence[RolloutGroup]) -> None:
        """Takes graded groups; those that complete a shard are written with it."""
        whole = []
        with self._changed:
            for group in groups:
                shard = group.index // self._size
                if shard not in self._held or not self.wants_groups(group.policy_version):
                    self.num_wasted += 1
                    continue
                self._graded[shard][group.index] = group
                if len(self._graded[shard]) == len(self._groups_of(shard)):
                    whole.append((shard, self._held[shard], self._graded.pop(shard)))
        for shard, lease, members in whole:
            is_first = self._write(shard, [members[index] for index in sorted(members)])
            with self._changed:
                self.num_written += len(members) if is_first else 0
                self.num_wasted += 0 if is_first else len(members)
                self._next_poll, self._last_news = 0.0, time.monotonic()
                if self._held.get(shard) is lease:
                    del self._held[shard]
                    if is_first:
                        self._num_accepted[shard] = sum(map(self._is_accepted, members.values()))
            lease.finish()

    def _write(self, shard: int, groups: Sequence[RolloutGroup]) -> bool:
        """Creates the shard's file; a disk that cannot be written is tried again, because the groups are whole."""
        end = None
        while True:
            try:
                return self._log.create(shard, groups)
            except OSError as error:
                if end is None:
                    end = time.monotonic() + WRITE_DEADLINE
                    say(f"shard {shard} cannot be written ({error}); trying for {WRITE_DEADLINE:g} s")
                if time.monotonic() > end:
                    raise
            time.sleep(RETRY_SECONDS)

    def put(self, group: RolloutGroup) -> None:
        """A group was appended: wakes the sampler, which may claim more."""
        with self._changed:
            self._notify()

    def wait_for_change(self, since: int, timeout: float) -> None:
        """Sleeps until ``num_changes`` is no longer ``since`` or it is time to look, at most ``timeout`` seconds."""
        if self._next_poll > (now := time.monotonic()):
            timeout = min(timeout, self._next_poll - now)
        super().wait_for_change(since, timeout)

    def fail(self, error: BaseException) -> None:
        """A thread of the worker has died; the process looks at ``failure``."""
        with self._changed:
            self.failure = self.failure or error
            self._notify()

    def _poll(self, window: Window) -> None:
        """Claims a shard where there is one, and says when to look again."""
        start, is_claimed = time.monotonic(), False
        with contextlib.suppress(OSError):  # a full or unreachable disk: the next look may find it well
            is_claimed = self._claim(window)
        now = time.monotonic()
        if is_claimed:
            self._next_poll, self._last_news = 0.0, now
        else:
            self._next_poll = now + storage.next_poll(now - start, now - self._last_news)

    def _claim(self, window: Window) -> bool:
        """Claims the first shard that is not written and that nobody holds (too long), where the window needs one.

        Groups count without a gap from the first on: a learner that takes them in order waits for the shard of a
        damaged file that was moved away, whatever comes after it. A shard in progress is expected to bring only
        groups that are accepted; where it does not, another is claimed when it is written.
        """
        version = window.policy_version
        self._read_log(version)
        shard = expected = 0
        while expected < window.num_groups:
            if shard not in self._num_accepted and shard not in self._held:
                lease = self._leases.claim(f"{version:06d}-{shard:06d}", self._patience)
                if lease is not None and not self._is_written(version, shard):
                    self._held[shard] = lease
                    self._graded[shard] = {}
                    self._todo.extend(self._groups_of(shard))
                    return True
                if lease is not None:  # written since the look at the log, or listed late by an object store
                    lease.finish()
                    self._count(version, shard)
            expected += self._num_accepted.get(shard, len(self._groups_of(shard)))
            shard += 1
        return False

    def _groups_of(self, shard: int) -> range:
        """Indices of a shard's groups; the last one of a fixed number has fewer."""
        end = (shard + 1) * self._size
        return range(shard * self._size, end if self._num_groups is None else min(end, self._num_groups))

    def _read_log(self, version: int) -> None:
        """Counts the groups of files that were not seen before; forgets those of files that were moved away."""
        parts = self._log.parts(version)
        for part in self._num_accepted.keys() - set(parts):
            if not self._is_written(version, part):
                del self._num_accepted[part]
        for part in parts:
            if part not in self._num_accepted and part not in self._held:  # ours, being written, is counted then
                self._count(version, part)

    def _count(self, version: int, part: int) -> None:
        if self._num_groups is not None:  # all of them are accepted
            self._num_accepted[part] = len(self._groups_of(part))
            return
        try:
            groups = self._log.read_part(version, part)
        except FileNotFoundError:  # moved away, and still listed
            return
        except ValueError:
            groups = []  # damaged: the trainer moves it away, and the shard is sampled again
        self._num_accepted[part] = sum(map(self._is_accepted, groups))

    def _is_written(self, version: int, shard: int) -> bool:
        """Asks for the file itself: an object store may list it late, or when it is gone."""
        return storage.exists(self._log.path(version, shard))
