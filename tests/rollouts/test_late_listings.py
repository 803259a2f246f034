"""Shards over an object store that lists late."""

import time

import pytest

from oapl_jax.io import storage
from oapl_jax.io.lease import Leases
from oapl_jax.rollouts.buffer import Window
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.shards import ShardQueue
from rollouts.groups import group
from rollouts.late_listings import LateListings, make_place

SIZE, VERSION = 2, 3


def put(log, shard, content=None):
    if content is not None:
        storage.replace(log.path(VERSION, shard), content)
    else:
        assert log.create(shard, [group(shard * SIZE + i, VERSION) for i in range(SIZE)])


@pytest.fixture
def root():
    return storage.shared_path(make_place())


def tickets(queue):
    taken = []
    while (ticket := queue.admit(VERSION)) is not None:
        taken.append(ticket.index)
    return taken


def test_the_store_of_this_test_lists_late(root, monkeypatch):
    storage.create(root / "a", b"1")
    assert storage.exists(root / "a")
    assert not storage.create(root / "a", b"2")
    assert storage.names(root) == []
    monkeypatch.setattr(LateListings, "lag", 0.0)
    assert storage.names(root) == ["a"]
    monkeypatch.setattr(LateListings, "lag", 1.0)
    time.sleep(1.1)
    storage.remove(root / "a")
    assert storage.names(root) == ["a"]
    assert not storage.exists(root / "a")


def test_a_shard_that_is_not_listed_yet_is_not_made_again_and_one_that_is_gone_is(root):
    log = RolloutLog(root / "rollouts")
    put(log, 1, b"PAR1 torn")
    time.sleep(1.1)
    put(log, 0)  # not listed for a second
    storage.move_aside(log.path(VERSION, 1))  # listed for a second
    assert log.parts(VERSION) == [1]
    assert log.read(VERSION) == []
    with Leases(root / "leases", 30.0) as leases:
        queue = ShardQueue(log, leases, lambda group: len(group.usable) >= 2, SIZE)
        queue.open_window(Window(VERSION, 0, 6))
        assert tickets(queue) == [2, 3, 4, 5]
