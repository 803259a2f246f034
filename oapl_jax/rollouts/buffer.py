"""The window's buffer: which groups the sampler should make, and which the learner may take.

Groups of a window have an index. Unless ``order`` says otherwise the learner takes them in the order of
the index, whatever the order in which they were finished, so a run is a function of its seed and not of
thread timing, and long responses are not crowded out by short ones that finish first. A group is trained
on once, or several times (``Consumption``).

The prompt of group ``i`` is ``asked_again[i]`` while there is one, and then the next of the prompt stream.
The next window starts after the last group that was consumed, and asks first what was passed by before it
(``left_over``): the prompt of a dropped group is asked again under the new policy. With ``window.max_version_lag``
groups of the version before are carried into a window instead; they come first in its batches.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from oapl_jax.types import RolloutGroup, RunError


class Ticket(NamedTuple):
    """Permission to sample one group."""

    policy_version: int
    index: int
    position: int
    """Place of the group's prompt in the prompt stream."""


class Window(NamedTuple):
    """What is to be sampled between two syncs."""

    policy_version: int
    start_position: int
    """Place in the prompt stream of the first group whose prompt is not asked again."""
    num_groups: int
    """Accepted groups that the learner wants, those that are carried into it included."""
    asked_again: tuple[int, ...] = ()
    """Places in the prompt stream of the first groups."""

    def position(self, index: int) -> int:
        """Place in the prompt stream of a group's prompt."""
        again = len(self.asked_again)
        return self.asked_again[index] if index < again else self.start_position + index - again

    def without(self, positions: Collection[int]) -> "Window":
        """The same window, which does not ask the prompts at these places of the stream."""
        end = max([self.start_position, *(position + 1 for position in positions)])
        asked = (*self.asked_again, *range(self.start_position, end))
        return self._replace(start_position=end, asked_again=tuple(place for place in asked if place not in positions))


class Consumption(NamedTuple):
    """Which groups make a batch. The defaults: each group once, in the order of the index."""

    order: Literal["index", "ready"] = "index"
    """ready: as they are finished; which groups make a batch then depends on timing."""
    epochs: int = 1
    """Passes over the window's groups; each after the first in an order of its own, drawn from ``seed``."""
    max_uses: int = 1
    """How often a group may be taken, where a batch lacks new ones: those least used and longest ago first."""
    min_groups: int = 0
    """New groups that must wait for the learner before the window's first batch."""
    seed: int = 0

    @property
    def limit(self) -> int:
        """How often a group may be taken in all."""
        return max(self.epochs, self.max_uses)


class Changes:
    """A lock, and a count of what has happened under it, for threads that wait for the next thing to happen."""

    def __init__(self):
        self._changed = threading.Condition()
        self.num_changes = 0

    def wait_for_change(self, since: int, timeout: float) -> None:
        """Sleeps until ``num_changes`` is no longer ``since``, at most ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self.num_changes != since, timeout)

    def _notify(self) -> None:
        self.num_changes += 1
        self._changed.notify_all()


UNKNOWN, FRESH, PASSED_OVER, TAKEN = range(4)
"""States of a group: not finished, accepted and not taken, finished and not accepted, taken at least once."""


class GroupBuffer(Changes):
    """Groups of one policy version between a sampler thread and the learner's.

    Groups that are not ``is_accepted`` are passed over. At most ``max_groups_ahead`` are admitted and not yet taken or
    passed over. What is asked about the whole window is counted over arrays with a byte for each group.
    """

    def __init__(
        self,
        is_accepted: Callable[[RolloutGroup], bool],
        max_groups_ahead: int | None = None,
        consumption: Consumption = Consumption(),  # noqa: B008 - immutable
    ):
        super().__init__()
        self._is_accepted = is_accepted
        self._max_ahead = max_groups_ahead
        self._consumption = consumption
        self._failure: BaseException | None = None
        self.num_dropped = 0
        self._begin(Window(-1, 0, 0))

    def _begin(self, window: Window) -> None:
        self._window, self._needed = window, window.num_groups
        self._carried: dict[int, RolloutGroup] = {}  # by place in the prompt stream, in the order of taking
        self._fresh: dict[int, RolloutGroup] = {}  # as they came
        self._taken: dict[int, RolloutGroup | None] = {}  # in the order of taking; None: it will not be taken again
        self._uses: dict[int, tuple[int, int]] = {}  # how often a group was taken, and the last batch that took it
        self._states = np.full(64, UNKNOWN, np.int8)  # by index; of the last one always UNKNOWN
        self._is_ungraded = np.zeros(64, bool)
        self._next_index, self._num_batches = 0, 0
        self.cursor = 0
        """Index after the last group of this version that was taken."""

    def open_window(
        self,
        window: Window,
        logged: Iterable[RolloutGroup] = (),
        batches: Sequence[Sequence[int]] = (),
        carried: Mapping[int, RolloutGroup] = {},
    ) -> None:
        """Starts a window: clears the buffer, drops and counts what the last window left.

        ``carried`` are groups of the version before, as of ``ready``, which are taken first. After a restart ``logged``
        are the groups that the rollout log has of this version, and ``batches`` the indices of the groups of each batch
        that the window has given.

        Raises:
            ValueError: groups are to be taken again, and ``logged`` lacks one of ``batches``; ``batches`` do not begin
                with ``carried``.
        """
        with self._changed:
            kept = sum(self._fresh.get(group.index) is group for group in carried.values())
            self.num_dropped += self._num_in_flight() + self.num_ready + self._num_passed_over() - kept
            self._begin(window)
            self._carried = dict(carried)
            self._needed -= len(carried)
            for group in logged:
                self._add(group)
            for indices in batches:
                lacking = [index for index in indices if index not in self._fresh and index not in self._taken]
                if lacking and self._consumption.limit > 1:
                    raise ValueError(
                        f"batches.jsonl has group {lacking[0]} of policy version {self.policy_version} in a batch, and the"
                        " rollout log does not have it; it would be trained on again: put the log's files back"
                    )
                self._take(indices)
            self._notify()

    def admit(self, policy_version: int) -> Ticket | None:
        """The next group for a sampler that holds this version's weights; None while none is wanted."""
        with self._changed:
            self._next_index = self._first_unknown(self._next_index)
            if policy_version != self.policy_version or self._is_supplied() or self._is_far_ahead():
                return None
            ticket = Ticket(self.policy_version, self._next_index, self._window.position(self._next_index))
            self._next_index += 1
            self._make_room(self._next_index)
            return ticket

    def wants_groups(self, policy_version: int) -> bool:
        """Whether the window is of this version and lacks sampled groups, graded or not: then the sampler goes on.

        In the order of the index only groups without a gap before them count: a slow group is waited for
        although later ones, which were started to fill empty rows, are finished.
        """
        with self._changed:
            states, is_ungraded = self._states, self._is_ungraded
            if self._consumption.order == "index":
                states, is_ungraded = states[self.cursor :], is_ungraded[self.cursor :]
                end = int(np.argmin((states != UNKNOWN) | is_ungraded))
                states, is_ungraded = states[:end], is_ungraded[:end]
                num_sampled = np.count_nonzero((states == FRESH) | is_ungraded)
            else:
                num_sampled = len(self._fresh) + np.count_nonzero(is_ungraded)
            return policy_version == self.policy_version and bool(num_sampled < self._needed)

    def mark_sampled(self, ticket: Ticket) -> None:
        """A group has left the sampler and will be ``put`` when it is graded."""
        with self._changed:
            if ticket.policy_version == self.policy_version:
                self._make_room(ticket.index)
                self._is_ungraded[ticket.index] = True

    def put(self, group: RolloutGroup) -> None:
        """Adds a graded group; one of another version came too late and is passed over (it was counted)."""
        with self._changed:
            if group.policy_version == self.policy_version:
                self._add(group)
                self._notify()

    def take(
        self,
        num_groups: int,
        deadline: float,
        is_cancelled: Callable[[], bool] = lambda: False,
        recorded: Sequence[int] | None = None,
    ) -> list[RolloutGroup]:
        """See ``GroupSource.take``; none where that is cancelled, which is asked every second until the ``deadline``.

        Raises:
            TimeoutError, RuntimeError: as there; a RunError where the sampler's error says enough.
            ValueError: a group of ``recorded`` is not usable now.
        """
        end = time.monotonic() + deadline
        with self._changed:
            while True:
                if self._failure is not None:
                    is_explained = isinstance(self._failure, RunError | ValueError | TimeoutError)
                    kind, what = (RunError, str(self._failure)) if is_explained else (RuntimeError, repr(self._failure))
                    raise kind(f"the sampler stopped: {what}") from self._failure
                indices = self._choose(num_groups) if recorded is None else self._all_there(recorded)
                if indices is not None:
                    return self._take(indices)
                if is_cancelled():
                    return []
                left = end - time.monotonic()
                if left <= 0:
                    raise TimeoutError(self._explain(num_groups, deadline, recorded))
                self._changed.wait(min(left, 1.0))

    @property
    def left_over(self) -> list[int]:
        """Places in the prompt stream that the next window has to ask before it goes on with the stream.

        Those of groups before the cursor that were not consumed, which there are in the order ``ready`` only,
        those that this window itself should have asked again and did not, and those of carried groups.
        """
        with self._changed:
            skipped = np.flatnonzero(self._states[: self.cursor] <= FRESH).tolist()
            skipped += range(self.cursor, len(self._window.asked_again))
            return [*self._carried, *map(self._window.position, skipped)]

    @property
    def policy_version(self) -> int:
        """Version whose groups the buffer holds; -1 before the first window."""
        return self._window.policy_version

    def fail(self, error: BaseException) -> None:
        """Tells the learner that no more groups will come."""
        with self._changed:
            self._failure = self._failure or error
            self._notify()

    @property
    def num_ready(self) -> int:
        """Accepted groups that wait for the learner."""
        with self._changed:
            return len(self._carried) + len(self._fresh)

    @property
    def ready(self) -> dict[int, RolloutGroup]:
        """Accepted groups of this version that wait for the learner, by index, by their place in the prompt stream."""
        with self._changed:
            return {self._window.position(index): self._fresh[index] for index in sorted(self._fresh)}

    def _make_room(self, index: int) -> None:
        while index >= len(self._states) - 1:
            self._states = np.append(self._states, np.full_like(self._states, UNKNOWN))
            self._is_ungraded = np.append(self._is_ungraded, np.zeros_like(self._is_ungraded))

    def _add(self, group: RolloutGroup) -> None:
        self._make_room(group.index)
        self._is_ungraded[group.index] = False
        if self._states[group.index] != UNKNOWN:
            return
        self._states[group.index] = PASSED_OVER
        if self._is_accepted(group):
            self._states[group.index], self._fresh[group.index] = FRESH, group

    def _first_unknown(self, start: int) -> int:
        """The first group from ``start`` on that is not finished."""
        return start + int(np.argmin(self._states[start:]))

    def _num_in_flight(self) -> int:
        return int(np.count_nonzero(self._states[: self._next_index] == UNKNOWN))

    def _num_passed_over(self) -> int:
        """Groups passed over that the learner has not gone past."""
        return int(np.count_nonzero(self._states[self.cursor :] == PASSED_OVER))

    def _is_supplied(self) -> bool:
        """Enough groups are sampled, in whatever order; groups in flight do not count, they may prove unusable.

        Nor do, in the order of the index, logged groups beyond the next index: a gap before them, in flight at a
        kill, comes first.
        """
        is_by_index = self._consumption.order == "index"
        ready = np.count_nonzero(self._states[: self._next_index] == FRESH) if is_by_index else len(self._fresh)
        return bool(ready + np.count_nonzero(self._is_ungraded) >= self._needed)

    def _is_far_ahead(self) -> bool:
        """Groups passed over do not count: a learner that waits for the groups after them would wait forever."""
        num_ahead = int(np.count_nonzero(self._states[: self._next_index] <= FRESH))
        return self._max_ahead is not None and num_ahead >= self._max_ahead

    def _choose(self, num_groups: int) -> list[int] | None:
        """Indices of the next batch; None: it has to wait."""
        batches_per_pass = max(1, self._window.num_groups // num_groups)
        number, batch = divmod(self._num_batches, batches_per_pass)
        if self._consumption.epochs > 1 and number > 0:
            draw = np.random.default_rng((self._consumption.seed, self.policy_version, number))
            return draw.permutation(list(self._taken)).tolist()[batch * num_groups : (batch + 1) * num_groups]
        takeable = [*(group.index for group in self._carried.values()), *self._takeable()]
        if self._num_batches == 0 and len(takeable) < min(self._consumption.min_groups, self._window.num_groups):
            return None
        chosen = takeable[:num_groups]
        if self._consumption.max_uses > 1 and len(chosen) < num_groups:
            used = [index for index, group in self._taken.items() if group is not None]
            chosen += sorted(used, key=lambda index: (self._uses[index], index))[: num_groups - len(chosen)]
        return chosen if len(chosen) == num_groups else None

    def _takeable(self) -> list[int]:
        """New groups in their order; by index, those up to the first that is not finished."""
        if self._consumption.order == "ready":
            return list(self._fresh)
        finished = self._states[self.cursor : self._first_unknown(self.cursor)]
        return (self.cursor + np.flatnonzero(finished == FRESH)).tolist()

    def _all_there(self, recorded: Sequence[int]) -> list[int] | None:
        own = recorded[len(self._carried) :]
        self._make_room(max(own, default=0))
        if unusable := [index for index in own if self._states[index] == PASSED_OVER]:
            raise ValueError(
                f"batches.jsonl has group {min(unusable)} of policy version {self.policy_version} in a batch, and it is"
                " not usable now; the rollout log or the config was changed in between"
            )
        return None if self._absent(own) else list(recorded)

    def _absent(self, recorded: Sequence[int]) -> list[int]:
        return [index for index in recorded if index not in self._fresh and self._taken.get(index) is None]

    def _take(self, indices: Sequence[int]) -> list[RolloutGroup]:
        """Moves the groups on, and returns those that are there: all of them but after a restart."""
        groups = []
        for index in indices:
            if self._carried:
                groups.append(self._take_carried(index))
                continue
            self._make_room(index)
            group = self._fresh.pop(index, None) or self._taken.get(index)
            uses = self._uses.get(index, (0, 0))[0] + 1
            self._uses[index] = uses, self._num_batches
            self._taken[index] = group if uses < self._consumption.limit else None
            self._states[index] = TAKEN
            self._needed = max(0, self._needed - 1)
            self.cursor = max(self.cursor, index + 1)
            if group is not None:
                groups.append(group)
        if self._consumption.order == "index":
            self._next_index = max(self._next_index, self.cursor)
        self._num_batches += 1
        self._notify()
        return groups

    def _take_carried(self, index: int) -> RolloutGroup:
        group = self._carried.pop(next(iter(self._carried)))
        if group.index != index:
            raise ValueError(
                f"batches.jsonl has group {index} of policy version {group.policy_version} in a batch of version"
                f" {self.policy_version}, and group {group.index} was carried into that window: one of the files was changed"
            )
        return group

    def _explain(self, num_groups: int, deadline: float, recorded: Sequence[int] | None) -> str:
        passed_over = self._num_passed_over()
        num_started = self._num_in_flight() + sum(index >= self.cursor for index in self._fresh) + passed_over
        what = f"{num_groups} groups of policy version {self.policy_version}"
        if recorded is not None:
            gone = self._absent(recorded[len(self._carried) :])
            what = f"groups {gone} of policy version {self.policy_version}, which batches.jsonl has in this batch"
        elif self._num_batches == 0 and self._consumption.min_groups > num_groups:
            what += f" (window.min_groups={self._consumption.min_groups} before the first batch)"
        return (
            f"waited {deadline:g} s for {what}: {len(self._carried) + len(self._takeable())} are ready,"
            f" group {self._first_unknown(self.cursor)} is not finished, {num_started} were started,"
            f" {passed_over} were finished but passed over as unusable. Responses may take longer than window.deadline, or"
            " nearly all groups are filtered out, or the sampler hangs"
        )
