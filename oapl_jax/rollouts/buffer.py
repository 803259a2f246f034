"""The window's buffer: which groups the sampler should make, and which the learner may take.

Groups of a window have an index. The learner takes them in the order of the index, whatever the
order in which they were finished, so a run is a function of its seed and not of thread timing,
and long responses are not crowded out by short ones that finish first. The prompt of group ``i``
is the one at ``start_position + i`` of the prompt stream; the next window starts after the last
group that was consumed, so the prompt of a dropped group is asked again under the new policy.
"""

import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from oapl_jax.types import RolloutGroup


class Ticket(NamedTuple):
    """Leave to sample one group."""

    policy_version: int
    index: int
    position: int
    """Place of the group's prompt in the prompt stream."""


class GroupBuffer:
    """Groups of one policy version between a sampler thread and the learner's.

    Args:
        is_accepted: which finished groups the learner wants; others are passed over.
        max_groups_ahead: groups that may be admitted beyond the learner's place; None: no limit.
    """

    def __init__(self, is_accepted: Callable[[RolloutGroup], bool], max_groups_ahead: int | None = None):
        self._is_accepted = is_accepted
        self._max_ahead = max_groups_ahead
        self._changed = threading.Condition()
        self._num_changes = 0
        self._failure: BaseException | None = None
        self._finished: dict[int, RolloutGroup | None] = {}  # None: finished, but passed over
        self._ungraded: set[int] = set()
        self._next_index = 0
        self._needed = 0
        self.policy_version = -1
        self.start_position = 0
        self.cursor = 0
        self.num_dropped = 0

    def open_window(
        self,
        policy_version: int,
        *,
        start_position: int,
        num_groups: int,
        logged: Iterable[RolloutGroup] = (),
        cursor: int = 0,
    ) -> None:
        """Starts a window: clears the buffer, drops and counts what the last window left.

        Args:
            policy_version: version whose groups the buffer holds from now on.
            start_position: place in the prompt stream of the window's first group.
            num_groups: accepted groups that the learner will take in the whole window.
            logged: groups of this version that are in the rollout log already, after a restart.
            cursor: index of the first group that was not consumed before the restart.
        """
        with self._changed:
            logged_ahead = sum(index >= self._next_index for index in self._finished)
            self.num_dropped += self._next_index - self.cursor + logged_ahead
            accepted = {group.index: self._accepted(group) for group in logged}
            consumed = sum(group is not None for index, group in accepted.items() if index < cursor)
            self._finished = {index: group for index, group in accepted.items() if index >= cursor}
            self._next_index = self.cursor = cursor
            self._needed, self._ungraded = num_groups - consumed, set()
            self.policy_version, self.start_position = policy_version, start_position
            self._notify()

    def admit(self, policy_version: int) -> Ticket | None:
        """The next group for a sampler that holds this version's weights; None while none is wanted."""
        with self._changed:
            while self._next_index in self._finished:
                self._next_index += 1
            if policy_version != self.policy_version or self._is_supplied() or self._is_far_ahead():
                return None
            ticket = Ticket(self.policy_version, self._next_index, self.start_position + self._next_index)
            self._next_index += 1
            return ticket

    def wants_groups(self, policy_version: int) -> bool:
        """Whether the window is of this version and lacks sampled groups: while it does, the sampler goes on.

        Only groups without a gap before them count, because the learner takes them in order: a slow
        group is waited for although later ones, which were started to fill empty rows, are finished.
        Groups that wait for their grades count as had.
        """
        with self._changed:
            return policy_version == self.policy_version and self._num_in_order() < self._needed

    def mark_sampled(self, ticket: Ticket) -> None:
        """A group has left the sampler and will be ``put`` when it is graded."""
        with self._changed:
            if ticket.policy_version == self.policy_version:
                self._ungraded.add(ticket.index)

    def put(self, group: RolloutGroup) -> None:
        """Adds a graded group; one of another version came too late and is passed over (it was counted)."""
        with self._changed:
            if group.policy_version == self.policy_version:
                self._ungraded.discard(group.index)
                self._finished[group.index] = self._accepted(group)
                self._notify()

    def take(
        self, num_groups: int, deadline: float, is_cancelled: Callable[[], bool] = lambda: False
    ) -> list[RolloutGroup]:
        """The next accepted groups in the order of their index; none when the wait is cancelled.

        Args:
            num_groups: how many; the call waits until they are finished.
            deadline: seconds to wait.
            is_cancelled: looked at every second.

        Raises:
            TimeoutError: after the deadline, with what was ready and what it waited for.
            RuntimeError: when the sampler has failed.
        """
        end = time.monotonic() + deadline
        with self._changed:
            while True:
                if self._failure is not None:
                    raise RuntimeError(f"the sampler stopped: {self._failure!r}") from self._failure
                taken, cursor = self._next_accepted(num_groups)
                if len(taken) == num_groups:
                    self._advance(cursor, num_groups)
                    return taken
                if is_cancelled():
                    return []
                left = end - time.monotonic()
                if left <= 0:
                    passed_over = sum(group is None for group in self._finished.values())
                    raise TimeoutError(
                        f"waited {deadline:g} s for {num_groups} groups of policy version {self.policy_version}: {len(taken)}"
                        f" are ready, group {cursor} is not finished, {self._next_index - self.cursor} were started,"
                        f" {passed_over} were finished but passed over as unusable. Responses may take longer than"
                        " window.deadline, or nearly all groups are filtered out, or the sampler hangs"
                    )
                self._changed.wait(min(left, 1.0))

    @property
    def num_changes(self) -> int:
        """Grows whenever something happens; see ``wait_for_change``."""
        return self._num_changes

    def wait_for_change(self, since: int, timeout: float) -> None:
        """Sleeps until ``num_changes`` is no longer ``since``, at most ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_changes != since, timeout)

    def fail(self, error: BaseException) -> None:
        """Tells the learner that no more groups will come."""
        with self._changed:
            self._failure = self._failure or error
            self._notify()

    @property
    def num_ready(self) -> int:
        """Accepted groups that wait for the learner."""
        with self._changed:
            return self._num_ready()

    def _notify(self) -> None:
        self._num_changes += 1
        self._changed.notify_all()

    def _accepted(self, group: RolloutGroup) -> RolloutGroup | None:
        return group if self._is_accepted(group) else None

    def _num_ready(self) -> int:
        return sum(group is not None for group in self._finished.values())

    def _is_supplied(self) -> bool:
        """Enough groups are sampled, in whatever order; groups in flight do not count, they may prove unusable.

        Nor do logged groups beyond the next index: a gap before them, in flight at a kill, comes first.
        """
        ready = sum(group is not None and index < self._next_index for index, group in self._finished.items())
        return ready + len(self._ungraded) >= self._needed

    def _num_in_order(self) -> int:
        """Groups from the cursor on, up to the first that is in flight, without those passed over."""
        number, index = 0, self.cursor
        while index in self._ungraded or index in self._finished:
            number += index in self._ungraded or self._finished[index] is not None
            index += 1
        return number

    def _is_far_ahead(self) -> bool:
        """Groups passed over do not count: a learner that waits for the groups after them would wait for ever."""
        passed_over = sum(group is None and index < self._next_index for index, group in self._finished.items())
        return self._max_ahead is not None and self._next_index - self.cursor - passed_over >= self._max_ahead

    def _next_accepted(self, num_groups: int) -> tuple[list[RolloutGroup], int]:
        """Accepted groups from the cursor on, up to the first that is not finished."""
        taken, cursor = [], self.cursor
        while len(taken) < num_groups and cursor in self._finished:
            group = self._finished[cursor]
            if group is not None:
                taken.append(group)
            cursor += 1
        return taken, cursor

    def _advance(self, cursor: int, num_groups: int) -> None:
        for index in range(self.cursor, cursor):
            del self._finished[index]
        self.cursor = cursor
        self._next_index = max(self._next_index, cursor)
        self._needed -= num_groups
        self._notify()
