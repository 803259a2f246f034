"""The window's buffer: which groups the sampler should make, and which the learner may take.

Groups of a window have an index. Unless ``order`` says otherwise the learner takes them in the order of
the index, whatever the order in which they were finished, so a run is a function of its seed and not of
thread timing, and long responses are not crowded out by short ones that finish first. A group is trained
on once, or several times (``Consumption``).

The prompt of group ``i`` is ``asked_again[i]`` while there is one, and then the next of the prompt stream.
The next window starts after the last group that was consumed, and asks first what was passed by before it
(``left_over``): the prompt of a dropped group is asked again under the new policy.
"""

import contextlib
import itertools
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from oapl_jax.types import RolloutGroup


class Ticket(NamedTuple):
    """Leave to sample one group."""

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
    """New accepted groups that the learner wants."""
    asked_again: tuple[int, ...] = ()
    """Places in the prompt stream of the first groups."""

    def position(self, index: int) -> int:
        """Place in the prompt stream of a group's prompt."""
        again = len(self.asked_again)
        return self.asked_again[index] if index < again else self.start_position + index - again


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
    def is_repeating(self) -> bool:
        """Groups are kept after their first use."""
        return self.epochs > 1 or self.max_uses > 1


class GroupBuffer:
    """Groups of one policy version between a sampler thread and the learner's.

    Admitting, putting and taking a group cost the same however large the window is: what they ask about the window
    is counted as groups move (``_moving``), never recounted.

    Args:
        is_accepted: which finished groups the learner wants; others are passed over.
        max_groups_ahead: groups that may be admitted and are not yet taken or passed over; None: no limit.
        consumption: which of them make a batch.
    """

    def __init__(
        self,
        is_accepted: Callable[[RolloutGroup], bool],
        max_groups_ahead: int | None = None,
        consumption: Consumption = Consumption(),  # noqa: B008 - immutable
    ):
        self._is_accepted = is_accepted
        self._max_ahead = max_groups_ahead
        self._consumption = consumption
        self._changed = threading.Condition()
        self._num_changes = 0
        self._failure: BaseException | None = None
        self.num_dropped = 0
        self._begin(Window(-1, 0, 0))

    def _begin(self, window: Window) -> None:
        """An empty buffer for a window."""
        self._window, self._needed = window, window.num_groups
        self._fresh: OrderedDict[int, RolloutGroup] = OrderedDict()  # accepted and not taken, as they came
        self._passed_over: set[int] = set()
        self._taken: dict[int, RolloutGroup | None] = {}  # in the order of taking; None: it will not be taken again
        self._ungraded: set[int] = set()
        self._next_index, self._num_batches = 0, 0
        self.cursor = 0
        """Index after the last group that was taken."""
        self._uses: dict[int, int] = {}  # how often a group was taken
        self._reusable: defaultdict[int, OrderedDict[int, None]] = defaultdict(OrderedDict)
        """By number of uses: groups that may be taken again, that which was used longest ago first."""
        self._epoch_order: tuple[tuple[int, int], list[int]] = ((0, 0), [])
        """Pass and number of groups; the order of the groups in this pass."""
        self._skipped: set[int] = set()
        """Before the cursor, neither taken nor passed over."""
        self._known_end, self._sampled_end = 0, 0
        """First indices from the cursor on that are not finished, and that are not even sampled."""
        self._in_order: OrderedDict[int, None] = OrderedDict()
        """Fresh groups from the cursor to ``_known_end``."""
        self._num_sampled = 0
        """Groups from the cursor to ``_sampled_end`` that are fresh or ungraded."""
        self._num_fresh_started, self._num_ahead = 0, 0
        """Groups before ``_next_index`` that are fresh, and those that are neither taken nor passed over."""

    def open_window(
        self,
        policy_version: int,
        *,
        start_position: int,
        num_groups: int,
        asked_again: Sequence[int] = (),
        logged: Iterable[RolloutGroup] = (),
        batches: Sequence[Sequence[int]] = (),
    ) -> None:
        """Starts a window: clears the buffer, drops and counts what the last window left.

        Args:
            policy_version: version whose groups the buffer holds from now on.
            start_position: place in the prompt stream of the first group whose prompt is not asked again.
            num_groups: new accepted groups that the learner wants in the whole window.
            asked_again: places in the prompt stream of the window's first groups.
            logged: groups of this version that are in the rollout log already, after a restart.
            batches: indices of the groups of each batch that the window has given already.

        Raises:
            ValueError: groups are to be taken again, and ``logged`` lacks one of ``batches``.
        """
        with self._changed:
            self.num_dropped += self._num_unconsumed()
            self._begin(Window(policy_version, start_position, num_groups, tuple(asked_again)))
            for group in logged:
                with self._moving(group.index):
                    self._add(group)
            self._extend()
            for indices in batches:
                lacking = [index for index in indices if index not in self._fresh and index not in self._taken]
                if lacking and self._consumption.is_repeating:
                    raise ValueError(
                        f"batches.jsonl has group {lacking[0]} of policy version {policy_version} in a batch, and the"
                        " rollout log does not have it; it would be trained on again: put the log's files back"
                    )
                self._take(indices)
            self._notify()

    def admit(self, policy_version: int) -> Ticket | None:
        """The next group for a sampler that holds this version's weights; None while none is wanted."""
        with self._changed:
            while self._is_known(self._next_index):
                self._start_to(self._next_index + 1)
            if policy_version != self.policy_version or self._is_supplied() or self._is_far_ahead():
                return None
            ticket = Ticket(self.policy_version, self._next_index, self._window.position(self._next_index))
            self._start_to(self._next_index + 1)
            return ticket

    def wants_groups(self, policy_version: int) -> bool:
        """Whether the window is of this version and lacks sampled groups: while it does, the sampler goes on.

        In the order of the index only groups without a gap before them count: a slow group is waited for
        although later ones, which were started to fill empty rows, are finished. Groups that wait for
        their grades count as had.
        """
        with self._changed:
            is_by_index = self._consumption.order == "index"
            num_sampled = self._num_sampled if is_by_index else len(self._fresh) + len(self._ungraded)
            return policy_version == self.policy_version and num_sampled < self._needed

    def mark_sampled(self, ticket: Ticket) -> None:
        """A group has left the sampler and will be ``put`` when it is graded."""
        with self._changed:
            if ticket.policy_version == self.policy_version:
                with self._moving(ticket.index):
                    self._ungraded.add(ticket.index)
                self._extend()

    def put(self, group: RolloutGroup) -> None:
        """Adds a graded group; one of another version came too late and is passed over (it was counted)."""
        with self._changed:
            if group.policy_version == self.policy_version:
                with self._moving(group.index):
                    self._ungraded.discard(group.index)
                    self._add(group)
                self._extend()
                self._notify()

    def take(
        self,
        num_groups: int,
        deadline: float,
        is_cancelled: Callable[[], bool] = lambda: False,
        recorded: Sequence[int] | None = None,
    ) -> list[RolloutGroup]:
        """The groups of the next batch; none when the wait is cancelled.

        Args:
            num_groups: how many; the call waits until they are finished.
            deadline: seconds to wait.
            is_cancelled: asked every second.
            recorded: indices of the groups that this batch had before a restart: it gets them again.

        Raises:
            TimeoutError: after the deadline, with what was ready and what it waited for.
            RuntimeError: when the sampler has failed.
            ValueError: a group of ``recorded`` is not usable now.
        """
        end = time.monotonic() + deadline
        with self._changed:
            while True:
                if self._failure is not None:
                    raise RuntimeError(f"the sampler stopped: {self._failure!r}") from self._failure
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
        and those that this window itself should have asked again and did not.
        """
        with self._changed:
            again = len(self._window.asked_again)
            return [self._window.position(i) for i in [*sorted(self._skipped), *range(self.cursor, again)]]

    @property
    def policy_version(self) -> int:
        """Version whose groups the buffer holds; -1 before the first window."""
        return self._window.policy_version

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
            return len(self._fresh)

    def _notify(self) -> None:
        self._num_changes += 1
        self._changed.notify_all()

    def _add(self, group: RolloutGroup) -> None:
        if self._is_known(group.index):
            return
        if self._is_accepted(group):
            self._fresh[group.index] = group
        else:
            self._passed_over.add(group.index)
            self._skipped.discard(group.index)

    def _is_known(self, index: int) -> bool:
        return index in self._fresh or self._is_behind(index)

    def _is_behind(self, index: int) -> bool:
        return index in self._taken or index in self._passed_over

    @contextlib.contextmanager
    def _moving(self, index: int) -> Iterator[None]:
        """Around every change of a group's state, or of an end that moves past it: keeps the counts true."""
        self._count(index, -1)
        yield
        self._count(index, 1)

    def _count(self, index: int, sign: int) -> None:
        is_fresh = index in self._fresh
        if index < self._next_index:
            self._num_fresh_started += sign * is_fresh
            self._num_ahead += sign * (not self._is_behind(index))
        if self.cursor <= index < self._sampled_end:
            self._num_sampled += sign * (is_fresh or index in self._ungraded)

    def _start_to(self, end: int) -> None:
        """Raises the next index."""
        for index in range(self._next_index, end):
            with self._moving(index):
                self._next_index = index + 1

    def _go_past(self, end: int) -> None:
        """Raises the cursor."""
        for index in range(self.cursor, end):
            with self._moving(index):
                self.cursor = index + 1
            self._in_order.pop(index, None)
            if not self._is_behind(index):
                self._skipped.add(index)
        self._extend()

    def _extend(self) -> None:
        """Moves the ends of what is finished, and of what is sampled, over what has become so."""
        self._known_end = max(self._known_end, self.cursor)
        while self._is_known(self._known_end):
            if self._known_end in self._fresh:
                self._in_order[self._known_end] = None
            self._known_end += 1
        self._sampled_end = max(self._sampled_end, self.cursor)
        while self._sampled_end in self._ungraded or self._is_known(self._sampled_end):
            with self._moving(self._sampled_end):
                self._sampled_end += 1

    def _num_unconsumed(self) -> int:
        """Groups that were started or finished and not taken, without those that the learner went past."""
        in_flight = self._num_ahead - self._num_fresh_started
        return in_flight + len(self._fresh) + sum(index >= self.cursor for index in self._passed_over)

    def _is_supplied(self) -> bool:
        """Enough groups are sampled, in whatever order; groups in flight do not count, they may prove unusable.

        Nor do, in the order of the index, logged groups beyond the next index: a gap before them, in flight at a
        kill, comes first.
        """
        ready = self._num_fresh_started if self._consumption.order == "index" else len(self._fresh)
        return ready + len(self._ungraded) >= self._needed

    def _is_far_ahead(self) -> bool:
        """Groups passed over do not count: a learner that waits for the groups after them would wait for ever."""
        return self._max_ahead is not None and self._num_ahead >= self._max_ahead

    def _choose(self, num_groups: int) -> list[int] | None:
        """Indices of the next batch; None: it has to wait."""
        batches_per_pass = max(1, self._window.num_groups // num_groups)
        number, batch = divmod(self._num_batches, batches_per_pass)
        if self._consumption.epochs > 1 and number > 0:
            return self._order_of_pass(number)[batch * num_groups : (batch + 1) * num_groups]
        takeable = self._takeable()
        if self._num_batches == 0 and len(takeable) < min(self._consumption.min_groups, self._window.num_groups):
            return None
        fresh = list(itertools.islice(takeable, num_groups))
        if self._consumption.max_uses > 1:
            used = itertools.chain.from_iterable(self._reusable[uses] for uses in sorted(self._reusable))
            fresh += itertools.islice(used, num_groups - len(fresh))
        return fresh if len(fresh) == num_groups else None

    def _takeable(self) -> OrderedDict[int, Any]:
        """New groups in their order; by index, those up to the first that is not finished."""
        return self._fresh if self._consumption.order == "ready" else self._in_order

    def _order_of_pass(self, number: int) -> list[int]:
        """Indices of the window's groups in a later pass over them."""
        key = number, len(self._taken)
        if self._epoch_order[0] != key:
            draw = np.random.default_rng((self._consumption.seed, self.policy_version, number))
            self._epoch_order = key, draw.permutation(list(self._taken)).tolist()
        return self._epoch_order[1]

    def _all_there(self, recorded: Sequence[int]) -> list[int] | None:
        if unusable := self._passed_over.intersection(recorded):
            raise ValueError(
                f"batches.jsonl has group {min(unusable)} of policy version {self.policy_version} in a batch, and it is"
                " not usable now; the rollout log or the config was changed in between"
            )
        is_there = all(index in self._fresh or self._taken.get(index) is not None for index in recorded)
        return list(recorded) if is_there else None

    def _take(self, indices: Sequence[int]) -> list[RolloutGroup]:
        """Moves the groups on, and returns those that are there: all of them but after a restart."""
        groups, limit = [], max(self._consumption.epochs, self._consumption.max_uses)
        for index in indices:
            with self._moving(index):
                group = self._fresh.pop(index, None) or self._taken.get(index)
                self._uses[index] = uses = self._uses.get(index, 0) + 1
                self._taken[index] = group if uses < limit else None
            self._in_order.pop(index, None)
            self._skipped.discard(index)
            if group is not None:
                groups.append(group)
        for index in sorted(indices):
            self._reusable[self._uses[index] - 1].pop(index, None)
            if self._taken[index] is not None:
                self._reusable[self._uses[index]][index] = None
        self._go_past(max([0, *(index + 1 for index in indices)]))
        if self._consumption.order == "index":
            self._start_to(self.cursor)
        self._needed = max(0, self._needed - len(indices))
        self._num_batches += 1
        self._notify()
        return groups

    def _explain(self, num_groups: int, deadline: float, recorded: Sequence[int] | None) -> str:
        takeable = self._takeable()
        passed_over = sum(index >= self.cursor for index in self._passed_over)
        what = f"{num_groups} groups of policy version {self.policy_version}"
        if recorded is not None:
            gone = [i for i in recorded if i not in self._fresh and self._taken.get(i) is None]
            what = f"groups {gone} of policy version {self.policy_version}, which batches.jsonl has in this batch"
        elif self._num_batches == 0 and self._consumption.min_groups > num_groups:
            what += f" (window.min_groups={self._consumption.min_groups} before the first batch)"
        return (
            f"waited {deadline:g} s for {what}: {len(takeable)} are ready, group {self._known_end} is not finished,"
            f" {self._num_ahead - self._num_fresh_started + sum(i >= self.cursor for i in [*self._fresh, *self._passed_over])} were started,"
            f" {passed_over} were finished but passed over as unusable. Responses may take longer than window.deadline, or"
            " nearly all groups are filtered out, or the sampler hangs"
        )
