"""Which shards of a window a detached sampler claims."""

import time

import pytest

from oapl_jax.io.lease import Leases
from oapl_jax.rollouts.buffer import Window
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.shards import ShardQueue
from rollouts.groups import group

SIZE, VERSION = 2, 3


@pytest.fixture
def log(tmp_path):
    return RolloutLog(tmp_path / "rollouts")


@pytest.fixture
def queue(tmp_path, log):
    with Leases(tmp_path / "leases", 30.0) as leases:
        queue = ShardQueue(log, leases, lambda group: len(group.usable) >= 2, SIZE)
        queue.open_window(Window(VERSION, 0, 6))
        yield queue


def write(log, shard, **options):
    log.create(shard, [group(shard * SIZE + i, VERSION, **options) for i in range(SIZE)])


def tickets(queue):
    """Indices of the groups that the queue wants now."""
    queue._next_poll = 0.0
    taken = []
    while (ticket := queue.admit(VERSION)) is not None:
        taken.append(ticket.index)
        queue._next_poll = 0.0
    return taken


def test_a_window_wants_its_groups_and_no_more(queue):
    assert tickets(queue) == [0, 1, 2, 3, 4, 5]


def test_groups_that_cannot_be_used_are_replaced(queue, log):
    write(log, 0, is_usable=False)
    assert tickets(queue) == [2, 3, 4, 5, 6, 7]


def test_a_shard_that_was_moved_away_is_wanted_again_whatever_came_after_it(queue, log, tmp_path):
    """While its file was torn another shard was made; the learner takes groups in order and waits for this one."""
    for shard in (0, 2, 3):
        write(log, shard)
    torn = tmp_path / "rollouts" / f"{VERSION:06d}" / "part-000001.parquet"
    torn.write_bytes(b"PAR1 torn")
    assert tickets(queue) == [], "four shards are there, and one of them may yet be read"
    torn.rename(torn.with_name(torn.name + ".damaged"))
    assert tickets(queue) == [2, 3]


def test_the_lease_of_a_shard_disappears_when_the_shard_is_written(queue, log, tmp_path):
    """By this process, or by another one while this one had claimed it."""
    assert tickets(queue) == [0, 1, 2, 3, 4, 5]
    write(log, 2)
    queue.append([group(index, VERSION) for index in (0, 1, 4, 5)])
    assert sorted(path.name for path in (tmp_path / "leases").iterdir()) == [f"{VERSION:06d}-000001.0"]


def test_a_claim_that_is_renewed_for_ever_and_brings_nothing_is_not_waited_for(log, tmp_path):
    folder = tmp_path / "leases"
    with Leases(folder, 30.0) as leases, Leases(folder, 0.1) as others:
        assert others.claim(f"{VERSION:06d}-000001") is not None
        queue = ShardQueue(log, leases, lambda group: len(group.usable) >= 2, SIZE, patience=1.0)
        queue.open_window(Window(VERSION, 0, 6))
        assert tickets(queue) == [0, 1, 4, 5]
        time.sleep(0.5)
        assert tickets(queue) == [], "it may yet be written"
        time.sleep(0.6)
        assert tickets(queue) == [2, 3]
        queue.append([group(index, VERSION) for index in (2, 3)])
        assert log.parts(VERSION) == [1]
