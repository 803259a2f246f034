"""The buffer counts as groups move; here its rules are recounted over the whole window, and its work is counted."""

import functools
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from oapl_jax.rollouts import buffer as buffers
from oapl_jax.rollouts.buffer import Consumption, GroupBuffer, Ticket, Window
from rollouts import groups

group = functools.cache(groups.group)


class Recounted:
    """The rules of ``GroupBuffer`` with nothing remembered but what happened to each group."""

    def __init__(self, ahead: int | None, consumption: Consumption, num_groups: int, logged=(), batches=()):
        self.ahead, self.consumption, self.num_groups, self.needed = ahead, consumption, num_groups, num_groups
        self.fresh, self.taken, self.uses = [], [], {}
        self.passed_over, self.ungraded = set(), set()
        self.next_index = self.cursor = self.num_batches = 0
        for index, is_usable in logged:
            self.put(index, is_usable)
        for batch in batches:
            self.consume(batch)

    def is_known(self, index):
        return index in self.fresh or index in self.taken or index in self.passed_over

    def run_from_cursor(self, is_there):
        end = self.cursor
        while is_there(end):
            end += 1
        return range(self.cursor, end)

    def admit(self):
        while self.is_known(self.next_index):
            self.next_index += 1
        ready = [i for i in self.fresh if i < self.next_index or self.consumption.order == "ready"]
        passed_by = [i for i in range(self.next_index) if i in self.taken or i in self.passed_over]
        is_far = self.ahead is not None and self.next_index - len(passed_by) >= self.ahead
        if len(ready) + len(self.ungraded) >= self.needed or is_far:
            return None
        self.next_index += 1
        return self.next_index - 1

    def wants_groups(self):
        if self.consumption.order == "ready":
            return len(self.fresh) + len(self.ungraded) < self.needed
        run = self.run_from_cursor(lambda i: i in self.ungraded or self.is_known(i))
        return sum(i in self.ungraded or i in self.fresh for i in run) < self.needed

    def put(self, index, is_usable):
        self.ungraded.discard(index)
        if not self.is_known(index):
            self.fresh.append(index) if is_usable else self.passed_over.add(index)

    def batches_per_pass(self, num_groups):
        return max(1, self.num_groups // num_groups)

    def number_of_pass(self, num_groups):
        return self.num_batches // self.batches_per_pass(num_groups) if self.consumption.epochs > 1 else 0

    def take(self, num_groups, seed_version=0):
        number, batch = divmod(self.num_batches, self.batches_per_pass(num_groups))
        takeable = self.fresh
        if self.consumption.order == "index":
            takeable = [i for i in self.run_from_cursor(self.is_known) if i in self.fresh]
        limit = max(self.consumption.epochs, self.consumption.max_uses)
        used = [i for i in self.taken if self.uses[i][0] < limit]
        used.sort(key=lambda i: (*self.uses[i], i))
        if self.consumption.epochs > 1 and number > 0:
            draw = np.random.default_rng((self.consumption.seed, seed_version, number))
            chosen = draw.permutation(self.taken).tolist()[batch * num_groups : (batch + 1) * num_groups]
        elif self.num_batches == 0 and len(takeable) < min(self.consumption.min_groups, self.num_groups):
            return None
        else:
            chosen = [*takeable, *(used if self.consumption.max_uses > 1 else [])][:num_groups]
            if len(chosen) < num_groups:
                return None
        self.consume(chosen)
        return chosen

    def consume(self, indices):
        for i in indices:
            if i in self.fresh:
                self.fresh.remove(i)
            if i not in self.taken:
                self.taken.append(i)
            self.uses[i] = (self.uses.get(i, (0, 0))[0] + 1, self.num_batches)
        self.cursor = max([self.cursor, *(i + 1 for i in indices)])
        if self.consumption.order == "index":
            self.next_index = max(self.next_index, self.cursor)
        self.needed = max(0, self.needed - len(indices))
        self.num_batches += 1

    def left_over(self):
        return [i for i in range(self.cursor) if i not in self.taken and i not in self.passed_over]

    def num_dropped(self):
        in_flight = sum(not self.is_known(i) for i in range(self.next_index))
        return in_flight + len(self.fresh) + sum(i >= self.cursor for i in self.passed_over)


CONSUMPTIONS = st.builds(
    Consumption,
    order=st.sampled_from(["index", "ready"]),
    epochs=st.integers(1, 2),
    max_uses=st.integers(1, 3),
    min_groups=st.integers(0, 3),
    seed=st.just(0),
).filter(lambda consumption: consumption.epochs == 1 or consumption.max_uses == 1)  # as TrainConfig has it
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["admit", "sampled", "put", "put", "take", "recorded"]), st.integers(0, 12), st.booleans()
    ),
    max_size=60,
)


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(
    consumption=CONSUMPTIONS,
    ahead=st.none() | st.integers(1, 6),
    num_groups=st.integers(1, 8),
    batch=st.integers(1, 3),
    logged=st.dictionaries(st.integers(0, 8), st.booleans(), max_size=6),
    has_batch=st.booleans(),
    events=EVENTS,
)
def test_counts_kept_as_groups_move_are_those_of_the_whole_window(
    consumption, ahead, num_groups, batch, logged, has_batch, events
):
    """Groups come in any order, also such as were never asked for, twice, or out of a log with gaps."""
    given = sorted(logged.items())
    usable = [index for index, is_usable in given if is_usable]
    batches = [usable[::2]] if has_batch and usable else []
    rules = Recounted(ahead, consumption, num_groups, given, batches)
    buffer = GroupBuffer(lambda item: bool(item.usable), ahead, consumption)
    logged_groups = [group(index, is_usable=is_usable) for index, is_usable in given]
    buffer.open_window(Window(0, 0, num_groups), logged=logged_groups, batches=batches)
    for event, index, is_usable in events:
        if event == "admit":
            ticket = buffer.admit(0)
            assert (None if ticket is None else ticket.index) == rules.admit()
        elif event == "sampled":
            buffer.mark_sampled(Ticket(0, index, index))
            rules.ungraded.add(index)
        elif event == "put":
            buffer.put(group(index, is_usable=is_usable))
            rules.put(index, is_usable)
        elif event == "recorded" and rules.fresh and rules.number_of_pass(batch) == 0:
            recorded = sorted(rules.fresh)[::2]
            assert [item.index for item in buffer.take(len(recorded), 0, recorded=recorded)] == recorded
            rules.consume(recorded)
        elif event == "take" and rules.number_of_pass(batch) < consumption.epochs:
            expected = rules.take(batch)
            try:
                assert [item.index for item in buffer.take(batch, 0)] == expected
            except TimeoutError:
                assert expected is None
        assert buffer.wants_groups(0) == rules.wants_groups()
        assert (buffer.num_ready, buffer.cursor) == (len(rules.fresh), rules.cursor)
        assert buffer.left_over == rules.left_over()
    buffer.open_window(Window(1, 0, 1))
    assert buffer.num_dropped == rules.num_dropped()


def work(num_groups: int, consumption: Consumption, batch: int = 5) -> int:
    """Lines of the buffer's file that one window of this many groups runs through, each turn of a loop included."""
    buffer = GroupBuffer(lambda item: bool(item.usable), None, consumption)
    made = [group(index, is_usable=index % 5 > 0) for index in range(2 * num_groups)]
    num_lines = 0

    def count(frame, event, argument):
        nonlocal num_lines
        if frame.f_code.co_filename != buffers.__file__:
            return None
        num_lines += 1
        return count

    def finish(index):
        buffer.mark_sampled(Ticket(0, index, index))
        buffer.put(made[index])
        buffer.wants_groups(0)

    before = sys.gettrace()
    sys.settrace(count)
    try:
        buffer.open_window(Window(0, 0, num_groups))
        while buffer.wants_groups(0) and (ticket := buffer.admit(0)) is not None:
            finish(ticket.index)
        for _ in range(consumption.epochs * num_groups // batch):
            assert len(buffer.take(batch, 0)) == batch
            assert buffer.left_over == []
    finally:
        sys.settrace(before)
    return num_lines


@pytest.mark.parametrize("consumption", [Consumption(), Consumption("ready"), Consumption(epochs=2)])
def test_the_work_of_a_window_grows_as_its_groups(consumption):
    """Not as their square: four times the groups, four times the lines."""
    assert work(400, consumption) < 4.4 * work(100, consumption)
