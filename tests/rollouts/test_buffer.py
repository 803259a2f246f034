"""The window's buffer: order by index, whatever the order of completion; windows; waits that end."""

import random
import threading
import time

import pytest

from oapl_jax.rollouts.buffer import Consumption, GroupBuffer, Window
from rollouts.groups import group

DEADLINE = 20.0


def make_buffer(num_groups=4, max_groups_ahead=None, version=0, start_position=0, consumption=Consumption(), **window):  # noqa: B008
    buffer = GroupBuffer(lambda item: bool(item.usable), max_groups_ahead, consumption)
    asked_again = window.pop("asked_again", ())
    buffer.open_window(Window(version, start_position, num_groups, asked_again), **window)
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
    buffer.open_window(Window(1, 2, 4))
    assert buffer.num_dropped == 4, "two finished, two in flight"
    assert (buffer.policy_version, buffer.cursor, buffer.num_ready) == (1, 0, 0)
    assert buffer.admit(1)[:] == (1, 0, 2)
    buffer.open_window(Window(2, 2, 4))
    assert buffer.num_dropped == 5


def test_stale_versions_get_no_tickets_and_their_groups_no_place():
    buffer = make_buffer(2)
    stale = buffer.admit(0)
    buffer.open_window(Window(1, 0, 2))
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


def drive(buffer, rng, is_usable, takes, num_groups, logged, flying, recorded=()):
    """Admits, finishes in random order and takes; returns the batches. Adds finished groups to ``logged``."""
    version, batches, recorded = buffer.policy_version, [], list(recorded)
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
                again = recorded[len(batches)] if len(batches) < len(recorded) else None
                batches.append(indices(buffer.take(num_groups, 0, recorded=again)))
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
    before = drive(killed, rng, is_usable, saved, num_groups, logged, flying)
    drive(killed, rng, is_usable, rng.randint(0, takes - saved), num_groups, logged, flying)
    rng.shuffle(logged)
    resumed = make_buffer(takes * num_groups, ahead, logged=logged, batches=before)
    assert drive(resumed, rng, is_usable, takes - saved, num_groups, [], []) == expected[saved:]
    assert resumed.cursor == whole.cursor
    assert resumed.admit(0) is None, "the window has all it wants"


def names(groups):
    return [(item.policy_version, item.index, item.prompt.id) for item in groups]


def carry(buffer, num_groups=6):
    """Opens the next window, into which the ready groups of this one are carried."""
    ready = buffer.ready
    window = Window(buffer.policy_version + 1, buffer.cursor, num_groups, tuple(buffer.left_over)).without(ready)
    buffer.open_window(window, carried=ready)
    return window


def test_groups_that_are_carried_into_the_next_window_come_first_and_oldest_first():
    buffer = make_buffer(6)
    tickets = [buffer.admit(0) for _ in range(6)]
    for i in (5, 0, 4, 2, 1):
        finish(buffer, tickets[i], is_usable=i != 4)
    buffer.take(1, DEADLINE)
    window = carry(buffer)
    assert window == Window(1, 6, 6, asked_again=(3, 4)), "in flight, and unusable: asked again, as at any sync"
    assert (buffer.num_dropped, buffer.num_ready) == (2, 3)
    tickets = [buffer.admit(1) for _ in range(4)]
    assert [ticket.position for ticket in tickets] == [3, 4, 6, 7]
    for ticket in tickets[:3]:
        assert buffer.wants_groups(1)
        finish(buffer, ticket)
    assert not buffer.wants_groups(1), "six are wanted, and three were carried"
    assert names(buffer.take(2, DEADLINE)) == [(0, 1, "test/1"), (0, 2, "test/2")]
    assert buffer.cursor == 0
    assert names(buffer.take(2, DEADLINE)) == [(0, 5, "test/5"), (1, 0, "test/3")]
    assert names(buffer.take(2, DEADLINE)) == [(1, 1, "test/4"), (1, 2, "test/6")]


def test_no_group_is_carried_twice_and_its_prompt_is_asked_again():
    buffer = make_buffer(6)
    for _ in range(3):
        finish(buffer, buffer.admit(0))
    carry(buffer)
    buffer.take(1, DEADLINE)
    assert buffer.left_over == [1, 2]
    buffer.open_window(Window(2, 3, 6, tuple(buffer.left_over)))
    assert [buffer.admit(2).position for _ in range(3)] == [1, 2, 3]
    assert buffer.num_ready == 0
    assert buffer.num_dropped == 2


def test_after_a_restart_the_batches_of_a_window_begin_with_what_was_carried_into_it():
    carried = {4: group(4), 5: group(5), 7: group(7)}
    resumed = make_buffer(6, version=1, logged=[group(0, 1), group(1, 1)], batches=[[4, 5]], carried=carried)
    assert names(resumed.take(2, DEADLINE, recorded=[7, 1])) == [(0, 7, "test/7"), (1, 1, "test/1")]
    with pytest.raises(ValueError, match=r"batches\.jsonl has group 5 of policy version 0 .* and group 4 was carried"):
        make_buffer(6, version=1, batches=[[5, 4]], carried=carried)


def test_after_a_restart_a_gap_in_the_log_is_filled_first():
    """Group 0 was in flight at the kill, the two after it were logged: enough by number, but not in order."""
    buffer = make_buffer(2, logged=[group(1), group(2)])
    ticket = buffer.admit(0)
    assert ticket.index == 0
    finish(buffer, ticket)
    assert buffer.admit(0) is None
    assert indices(buffer.take(2, DEADLINE)) == [0, 1]
    buffer.open_window(Window(1, 2, 2))
    assert buffer.num_dropped == 1, "the logged group that was not taken"


def test_ready_takes_groups_as_they_are_finished_and_the_next_window_asks_first_what_was_passed_by():
    buffer = make_buffer(4, start_position=10, consumption=Consumption(order="ready"))
    tickets = [buffer.admit(0) for _ in range(6)]
    for i, is_usable in ((3, True), (2, False), (1, True), (5, True)):
        finish(buffer, tickets[i], is_usable)
    assert indices(buffer.take(2, DEADLINE)) == [3, 1], "neither waits for group 0"
    assert buffer.cursor == 4
    assert buffer.left_over == [10], "its prompt is asked again; that of the unusable group 2 counts as asked"
    buffer.open_window(Window(1, 10 + buffer.cursor, 4, tuple(buffer.left_over)))
    assert buffer.num_dropped == 3, "group 5 was ready, groups 0 and 4 in flight"
    tickets = [buffer.admit(1) for _ in range(3)]
    assert [ticket.position for ticket in tickets] == [10, 14, 15]
    for i in (1, 2):
        finish(buffer, tickets[i])
    buffer.take(2, DEADLINE)
    assert buffer.left_over == [10], "passed by a second time"


def test_what_a_window_has_to_ask_again_and_did_not_is_left_to_the_next():
    buffer = make_buffer(4, start_position=20, asked_again=(3, 5, 8))
    finish(buffer, buffer.admit(0))
    buffer.take(1, DEADLINE)
    assert buffer.left_over == [5, 8]


def test_epochs_take_the_windows_groups_again_in_another_order_each():
    def run(version, seed):
        buffer = make_buffer(6, version=version, consumption=Consumption(epochs=3, seed=seed))
        for i in range(7):
            finish(buffer, buffer.admit(version), is_usable=i != 2)
        assert buffer.admit(version) is None, "no more than the first pass takes"
        return [indices(buffer.take(2, DEADLINE)) for _ in range(9)]

    batches = run(0, seed=0)
    passes = [[*batches[i], *batches[i + 1], *batches[i + 2]] for i in (0, 3, 6)]
    assert passes[0] == [0, 1, 3, 4, 5, 6]
    assert all(sorted(one) == passes[0] for one in passes), "every group once in every pass"
    assert len({tuple(one) for one in passes}) == 3
    assert run(0, seed=0) == batches
    assert run(1, seed=0) != batches
    assert run(0, seed=1) != batches


def test_a_group_is_used_again_only_where_new_ones_are_lacking_and_at_most_max_uses_times():
    buffer = make_buffer(10, consumption=Consumption(max_uses=3))
    tickets = [buffer.admit(0) for _ in range(4)]
    finish(buffer, tickets[0])
    finish(buffer, tickets[1])
    assert indices(buffer.take(2, DEADLINE)) == [0, 1]
    assert indices(buffer.take(2, DEADLINE)) == [0, 1]
    finish(buffer, tickets[2])
    assert indices(buffer.take(2, DEADLINE)) == [2, 0], "the new one first"
    assert indices(buffer.take(2, DEADLINE)) == [2, 1], "then those least used"
    with pytest.raises(TimeoutError):
        buffer.take(2, 0.01)
    finish(buffer, tickets[3])
    assert indices(buffer.take(2, DEADLINE)) == [3, 2]
    assert buffer.admit(0) is None, "ten were taken, four of them new"


def test_the_first_batch_of_a_window_waits_for_min_groups():
    buffer = make_buffer(4, version=2, consumption=Consumption(min_groups=3))
    tickets = [buffer.admit(2) for _ in range(4)]
    for i in (0, 1, 3):
        finish(buffer, tickets[i])
    with pytest.raises(
        TimeoutError, match=r"window\.min_groups=3 before the first batch\): 2 are ready, group 2 is not"
    ):
        buffer.take(1, 0.01)
    finish(buffer, tickets[2])
    assert indices(buffer.take(1, DEADLINE)) == [0]
    buffer.open_window(Window(3, 1, 2))
    for _ in range(2):
        finish(buffer, buffer.admit(3))
    assert indices(buffer.take(1, DEADLINE)) == [0], "a last, short window has fewer groups than min_groups"


@pytest.mark.parametrize("seed", range(30))
def test_a_restart_gives_recorded_batches_again_where_they_depend_on_timing(seed):
    """Killed after some batches; resumed from an earlier checkpoint, with the log and the record of all batches."""
    rng = random.Random(seed)
    consumption = rng.choice([Consumption(order="ready"), Consumption(max_uses=2), Consumption("ready", max_uses=3)])
    is_usable = [rng.random() < 0.7 for _ in range(500)]
    logged, flying = [], []
    killed = make_buffer(15, consumption=consumption)
    before = drive(killed, rng, is_usable, rng.randint(0, 2), 3, logged, flying)
    lost = drive(killed, rng, is_usable, rng.randint(0, 3), 3, logged, flying)
    rng.shuffle(logged)
    resumed = make_buffer(15, consumption=consumption, logged=logged, batches=before)
    left = 5 - len(before)
    batches = drive(resumed, rng, is_usable, left, 3, [], [], recorded=lost)
    assert batches[: len(lost)] == lost
    uses = [index for batch in [*before, *batches] for index in batch]
    assert max(map(uses.count, uses)) <= consumption.max_uses
    assert all(is_usable[index] for index in uses)


def test_a_recorded_group_that_is_not_usable_now_is_an_error():
    buffer = make_buffer(4, logged=[group(0), group(1, is_usable=False)])
    with pytest.raises(ValueError, match=r"batches.jsonl has group 1 of policy version 0.*not usable now"):
        buffer.take(2, DEADLINE, recorded=[0, 1])


def test_groups_to_be_taken_again_that_the_log_lacks_are_an_error():
    with pytest.raises(ValueError, match=r"batches.jsonl has group 1 of policy version 0.*put the log's files back"):
        make_buffer(4, logged=[group(0)], batches=[[0, 1]], consumption=Consumption(epochs=2))


def test_a_group_that_comes_twice_is_taken_once():
    buffer = make_buffer(2)
    for _ in range(2):
        buffer.put(group(0))
    buffer.take(1, DEADLINE)
    buffer.put(group(0))
    assert buffer.num_ready == 0


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
    buffer.open_window(Window(0, 0, takes * num_groups))
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
        buffer.open_window(Window(version + 1, position, takes * num_groups))
    done.set()
    for producer in producers:
        producer.join(DEADLINE)
        assert not producer.is_alive()
