"""The window's buffer: order by index, whatever the order of completion; windows; waits that end."""

import random
import threading
import time

import pytest

from oapl_jax.rollouts.buffer import GroupBuffer
from rollouts.groups import group

DEADLINE = 20.0


def make_buffer(num_groups=4, max_groups_ahead=None, version=0, start_position=0, **window):
    buffer = GroupBuffer(lambda item: bool(item.usable), max_groups_ahead)
    buffer.open_window(version, start_position=start_position, num_groups=num_groups, **window)
    return buffer


def finish(buffer, ticket, is_usable=True):
    buffer.mark_sampled(ticket)
    buffer.put(group(ticket.index, ticket.policy_version, position=ticket.position, is_usable=is_usable))


def indices(groups):
    return [item.index for item in groups]


def test_groups_are_taken_by_index_whatever_the_order_of_completion():
    buffer = make_buffer(6)
    tickets = [buffer.admit(0) for _ in range(6)]
    assert [(t.index, t.position) for t in tickets] == [(i, i) for i in range(6)]
    for i in (3, 1, 5, 2):
        finish(buffer, tickets[i])
    with pytest.raises(TimeoutError):
        buffer.take(2, 0.01)
    finish(buffer, tickets[0])
    assert indices(buffer.take(2, DEADLINE)) == [0, 1]
    assert buffer.num_ready == 3
    finish(buffer, tickets[4])
    assert indices(buffer.take(4, DEADLINE)) == [2, 3, 4, 5]
    assert buffer.cursor == 6


def test_groups_that_are_not_accepted_are_passed_over_and_replaced():
    buffer = make_buffer(3)
    for i in range(3):
        finish(buffer, buffer.admit(0), is_usable=i != 1)
    assert buffer.num_ready == 2
    replacement = buffer.admit(0)
    assert replacement.index == 3
    finish(buffer, replacement)
    assert buffer.admit(0) is None
    assert indices(buffer.take(3, DEADLINE)) == [0, 2, 3]
    assert buffer.cursor == 4


def test_positions_start_where_the_window_does():
    buffer = make_buffer(2, start_position=70, version=5)
    assert buffer.admit(5)[:] == (5, 0, 70)
    assert buffer.admit(5)[:] == (5, 1, 71)


def test_a_window_wants_no_more_groups_than_it_takes():
    buffer = make_buffer(2)
    tickets = [buffer.admit(0) for _ in range(5)]
    assert None not in tickets, "groups in flight are surplus that may be needed"
    buffer.mark_sampled(tickets[0])
    assert buffer.wants_groups(0)
    buffer.mark_sampled(tickets[1])
    assert not buffer.wants_groups(0), "two wait for their grades"
    assert buffer.admit(0) is None
    buffer.put(group(0, is_usable=False))
    assert buffer.wants_groups(0), "one of them was not accepted"
    finish(buffer, tickets[2])
    assert not buffer.wants_groups(0)
    buffer.put(group(1))
    assert indices(buffer.take(2, DEADLINE)) == [1, 2]
    assert buffer.admit(0) is None


def test_a_slow_group_is_waited_for_although_enough_later_ones_are_finished():
    buffer = make_buffer(2)
    slow, *others = [buffer.admit(0) for _ in range(4)]
    for ticket in others:
        finish(buffer, ticket)
    assert buffer.num_ready == 3
    assert buffer.admit(0) is None, "no further group is needed"
    assert buffer.wants_groups(0), "but the learner takes the slow one first"
    finish(buffer, slow)
    assert not buffer.wants_groups(0)
    assert indices(buffer.take(2, DEADLINE)) == [0, 1]


def test_a_new_window_clears_the_buffer_and_counts_what_it_drops():
    buffer = make_buffer(4)
    tickets = [buffer.admit(0) for _ in range(6)]
    for ticket in tickets[:4]:
        finish(buffer, ticket)
    buffer.take(2, DEADLINE)
    assert buffer.num_dropped == 0
    buffer.open_window(1, start_position=2, num_groups=4)
    assert buffer.num_dropped == 4, "two finished, two in flight"
    assert (buffer.policy_version, buffer.cursor, buffer.num_ready) == (1, 0, 0)
    assert buffer.admit(1)[:] == (1, 0, 2)
    buffer.open_window(2, start_position=2, num_groups=4)
    assert buffer.num_dropped == 5


def test_stale_versions_get_no_tickets_and_their_groups_no_place():
    buffer = make_buffer(2)
    stale = buffer.admit(0)
    buffer.open_window(1, start_position=0, num_groups=2)
    assert buffer.admit(0) is None
    assert not buffer.wants_groups(0)
    buffer.mark_sampled(stale)
    buffer.put(group(0, 0))
    assert buffer.num_ready == 0
    for _ in range(2):
        finish(buffer, buffer.admit(1))
    assert [item.policy_version for item in buffer.take(2, DEADLINE)] == [1, 1]


def test_nothing_is_admitted_before_the_first_window():
    buffer = GroupBuffer(lambda item: True)
    assert buffer.admit(0) is None
    assert buffer.admit(-1) is None


def test_the_sampler_is_never_more_than_max_groups_ahead():
    buffer = make_buffer(9, max_groups_ahead=3)
    tickets = [buffer.admit(0) for _ in range(3)]
    assert buffer.admit(0) is None
    for ticket in tickets:
        finish(buffer, ticket)
    assert buffer.admit(0) is None
    buffer.take(2, DEADLINE)
    assert [buffer.admit(0).index for _ in range(2)] == [3, 4]
    assert buffer.admit(0) is None


def test_groups_passed_over_do_not_count_as_ahead():
    """Else a learner that needs all of them would wait for groups that may not be started."""
    buffer = make_buffer(4, max_groups_ahead=2)
    finish(buffer, buffer.admit(0), is_usable=False)
    finish(buffer, buffer.admit(0))
    finish(buffer, buffer.admit(0))
    assert indices(buffer.take(2, DEADLINE)) == [1, 2]


def test_a_deadline_says_what_it_waited_for():
    buffer = make_buffer(4, version=7)
    tickets = [buffer.admit(7) for _ in range(3)]
    finish(buffer, tickets[0])
    start = time.monotonic()
    with pytest.raises(
        TimeoutError,
        match=r"waited 0\.05 s for 2 groups of policy version 7: 1 are ready, group 1 is not finished, 3 were started",
    ):
        buffer.take(2, 0.05)
    assert 0.04 < time.monotonic() - start < 5
    finish(buffer, tickets[1])
    assert indices(buffer.take(2, DEADLINE)) == [0, 1], "the deadline took nothing"


@pytest.mark.parametrize(("error", "told"), [(ValueError("no such file"), "no such file"), (KeyError(), "KeyError")])
def test_a_failed_sampler_ends_the_learners_wait_with_its_reason(error, told):
    buffer = make_buffer()
    threading.Timer(0.05, buffer.fail, [error]).start()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=told) as caught:
        buffer.take(1, DEADLINE)
    assert caught.value.__cause__ is error
    assert time.monotonic() - start < DEADLINE / 2
    buffer.fail(OSError("later"))
    with pytest.raises(RuntimeError, match=told):
        buffer.take(1, DEADLINE)


def drive(buffer, rng, is_usable, takes, num_groups, logged, flying):
    """Admits, finishes in random order and takes; returns the batches. Adds finished groups to ``logged``."""
    version, batches = buffer.policy_version, []
    for _ in range(10_000):
        if len(batches) == takes:
            return batches
        if rng.random() < 0.5 and len(flying) < 6 and (ticket := buffer.admit(version)):
            flying.append(ticket)
        if flying and rng.random() < 0.6 and buffer.wants_groups(version):
            ticket = flying.pop(rng.randrange(len(flying)))
            finish(buffer, ticket, is_usable[ticket.index])
            logged.append(group(ticket.index, version, is_usable=is_usable[ticket.index]))
        if rng.random() < 0.3:
            try:
                batches.append(indices(buffer.take(num_groups, 0)))
            except TimeoutError:
                continue
    raise AssertionError(f"no progress: {len(batches)} of {takes} batches, {len(flying)} groups in flight")


@pytest.mark.parametrize("seed", range(40))
def test_a_restart_from_the_log_gives_the_batches_of_an_uninterrupted_run(seed):
    rng = random.Random(seed)
    takes, num_groups = 5, rng.randint(1, 4)
    ahead = rng.choice([None, num_groups, num_groups + 3])
    is_usable = [rng.random() < 0.7 for _ in range(500)]
    good = [index for index, usable in enumerate(is_usable) if usable]
    expected = [good[i * num_groups : (i + 1) * num_groups] for i in range(takes)]
    whole = make_buffer(takes * num_groups, ahead)
    assert drive(whole, rng, is_usable, takes, num_groups, [], []) == expected

    # Killed after a checkpoint at ``saved`` batches and some more that are lost.
    logged, flying = [], []
    killed = make_buffer(takes * num_groups, ahead)
    saved = rng.randint(0, takes - 1)
    drive(killed, rng, is_usable, saved, num_groups, logged, flying)
    cursor = killed.cursor
    drive(killed, rng, is_usable, rng.randint(0, takes - saved), num_groups, logged, flying)
    rng.shuffle(logged)
    resumed = make_buffer(takes * num_groups, ahead, logged=logged, cursor=cursor)
    assert drive(resumed, rng, is_usable, takes - saved, num_groups, [], []) == expected[saved:]
    assert resumed.cursor == whole.cursor
    assert resumed.admit(0) is None, "the window has all it wants"


def test_after_a_restart_a_gap_in_the_log_is_filled_first():
    """Group 0 was in flight at the kill, the two after it were logged: enough by number, but not in order."""
    buffer = make_buffer(2, logged=[group(1), group(2)])
    ticket = buffer.admit(0)
    assert ticket.index == 0
    finish(buffer, ticket)
    assert buffer.admit(0) is None
    assert indices(buffer.take(2, DEADLINE)) == [0, 1]
    buffer.open_window(1, start_position=2, num_groups=2)
    assert buffer.num_dropped == 1, "the logged group that was not taken"


@pytest.mark.parametrize(("seed", "ahead"), [(0, None), (1, 3), (2, 5)])
def test_producers_and_a_consumer_never_wait_for_each_other_for_ever(seed, ahead):
    """Three producers that finish out of order, some groups unusable, over several windows."""
    windows, takes, num_groups = 6, 5, 3
    buffer = GroupBuffer(lambda item: bool(item.usable), ahead)
    done = threading.Event()
    end = time.monotonic() + DEADLINE

    def produce(number):
        rng = random.Random(100 * seed + number)
        try:
            while not done.is_set():
                assert time.monotonic() < end, "producer: no end in sight"
                ticket = buffer.admit(buffer.policy_version)
                if ticket is None:
                    buffer.wait_for_change(buffer.num_changes, 0.01)
                    continue
                time.sleep(rng.random() * 0.002)
                # Whether a group is usable depends on the group, not on who makes it.
                finish(buffer, ticket, (ticket.index * 7 + ticket.policy_version) % 4 != 0)
        except BaseException as error:
            buffer.fail(error)

    producers = [threading.Thread(target=produce, args=(i,), daemon=True) for i in range(3)]
    position = 0
    buffer.open_window(0, start_position=0, num_groups=takes * num_groups)
    for producer in producers:
        producer.start()
    for version in range(windows):
        usable = [i for i in range(100) if (i * 7 + version) % 4 != 0]
        for step in range(takes):
            taken = buffer.take(num_groups, DEADLINE)
            assert indices(taken) == usable[step * num_groups : (step + 1) * num_groups]
            assert [item.prompt.id for item in taken] == [f"test/{position + item.index}" for item in taken]
            assert {item.policy_version for item in taken} == {version}
        position += buffer.cursor
        buffer.open_window(version + 1, start_position=position, num_groups=takes * num_groups)
    done.set()
    for producer in producers:
        producer.join(DEADLINE)
        assert not producer.is_alive()
