"""Leases: one holder at a time, given up by release, by death and by silence."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from oapl_jax.io import storage
from oapl_jax.io.lease import Leases

HOLD = """
import pathlib, sys, time
from oapl_jax.io.lease import Leases
leases = Leases(pathlib.Path(sys.argv[1]), expires=float(sys.argv[2]))
assert leases.claim("work") is not None
print("held", flush=True)
time.sleep(60)
"""


def holder(directory, expires: float) -> subprocess.Popen:
    """A process that has claimed ``work`` and keeps it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory), str(expires)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def claim_all(directory, names, queue):
    with Leases(directory) as leases:
        queue.put([name for name in names if leases.claim(name) is not None])
        time.sleep(1.0)  # hold them until all have tried


def test_a_name_is_held_once_and_free_after_release(tmp_path):
    with Leases(tmp_path) as first, Leases(tmp_path) as second:
        lease = first.claim("a")
        assert lease is not None
        assert lease.is_held
        assert second.claim("a") is None
        assert first.claim("a") is None
        assert second.claim("b") is not None
        lease.release()
        assert not lease.is_held
        taken = second.claim("a")
        assert taken is not None
        assert taken.generation == 1
        assert taken.is_held


@pytest.mark.parametrize(
    "content",
    [
        *(b"[]", b"null", b"9" * 400, b"[" * 100_000, b"\xff", b'{"is_released": []}'),
        *(b'{"host": "HOST", "pid": 1}', b'{"host": "HOST", "pid": 1e999, "started": "1"}'),
        *(b'{"host": "HOST", "pid": %s, "started": "1"}' % (b"9" * 400), b'{"host": [], "pid": 1, "started": "1"}'),
        *("folder", "pipe", "link"),
    ],
)
def test_a_file_that_is_no_lease_is_taken_over_after_the_expiry(tmp_path, content):
    with Leases(tmp_path, expires=0.05) as leases:
        path = leases.path("a", 0)
        if isinstance(content, bytes):
            path.write_bytes(content.replace(b"HOST", leases._owner["host"].encode()))
        else:
            {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("nowhere")}[
                content
            ]()
        assert leases.claim("a") is None
        time.sleep(0.06)
        assert leases.claim("a") is not None


def test_closing_releases_everything(tmp_path):
    with Leases(tmp_path) as first:
        assert first.claim("a")
        assert first.claim("b")
    with Leases(tmp_path) as second:
        assert second.claim("a")
        assert second.claim("b")


def test_four_processes_that_claim_at_once_share_the_names_without_overlap(tmp_path):
    names = [f"shard-{i}" for i in range(50)]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=claim_all, args=(tmp_path, names, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    claimed = [name for _ in processes for name in queue.get(timeout=60)]
    for process in processes:
        process.join(60)
    # All are claimed; none twice while it was held (a name that a process released may be claimed again).
    assert set(claimed) == set(names)
    generations = [len(list(tmp_path.glob(f"{name}.*"))) for name in names]
    assert sum(generations) == len(claimed)


def test_a_dead_process_of_this_host_loses_its_lease_at_once(tmp_path):
    process = holder(tmp_path, expires=600)
    with Leases(tmp_path, expires=600) as leases:
        assert leases.claim("work") is None
        process.kill()
        process.wait()
        assert leases.claim("work") is not None


def test_a_stopped_process_loses_its_lease_after_the_expiry_only(tmp_path):
    process = holder(tmp_path, expires=1.0)
    try:
        with Leases(tmp_path, expires=1.0) as leases:
            end = time.monotonic() + 2.0
            while time.monotonic() < end:  # it beats: two expiries pass and it keeps its lease
                assert leases.claim("work") is None
                time.sleep(0.1)
            os.kill(process.pid, signal.SIGSTOP)
            start = time.monotonic()
            while (lease := leases.claim("work")) is None:
                assert time.monotonic() - start < 30
                time.sleep(0.05)
            assert time.monotonic() - start > 0.7  # its last beat may be a quarter of the expiry old
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.6)
            assert lease.is_held
            assert leases.claim("work") is None
    finally:
        process.kill()
        process.wait()


def test_a_holder_that_was_overtaken_knows(tmp_path):
    with Leases(tmp_path, expires=600) as leases:
        lease = leases.claim("a")
        assert lease is not None
        leases.path("a", 1).write_text("another's")
        assert not lease.renew()
        assert not lease.is_held
        lease.release()  # writes nothing over the other's
        assert leases.path("a", 1).read_text() == "another's"


FORGERIES = {
    "removed": lambda path: path.unlink(),
    "overwritten": lambda path: path.write_text("{}"),
    "released": lambda path: path.write_text('{"host": "x", "pid": 1, "started": "1", "is_released": true}'),
    "of the next generation": lambda path: path.with_suffix(".1").write_text('{"host": "x", "pid": 1, "started": "1"}'),
    "of two more": lambda path: [path.with_suffix(f".{i}").write_text("x") for i in (1, 2)],
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link": lambda path: (path.unlink(), path.symlink_to("/dev/null")),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_a_sole_holder_that_beats_in_time_is_not_ended_by_files_of_others(tmp_path, forge):
    with Leases(tmp_path, expires=2.0) as first, Leases(tmp_path, expires=2.0) as second:
        lease = first.claim_from_the_dead("trainer")
        forge(first.path("trainer", 0))
        assert lease.renew()
        assert second.claim_from_the_dead("trainer") is None, "its beats are seen"
        assert lease.is_held
        lease.release()
        assert second.claim("trainer") is not None


def test_a_sole_holder_that_was_suspended_leaves_the_lease_of_the_next_one_alone(tmp_path):
    first, third = Leases(tmp_path, expires=0.2), Leases(tmp_path, expires=0.2)
    with Leases(tmp_path, expires=60.0) as second:
        lease = first.claim_from_the_dead("trainer")
        first.stop_beating(lease)
        first.path("trainer", 0).write_text("")  # of another host
        while lease.is_held:
            time.sleep(0.02)
        second.expires = 0.1
        while (taken := second.claim("trainer")) is None:
            time.sleep(0.02)
        second.expires = 60.0
        lease.release()
        assert third.claim("trainer") is None
        assert taken.renew()


def test_a_torn_file_is_taken_over_when_it_was_silent_long_enough(tmp_path):
    tmp_path.joinpath("a.0").write_text("")
    with Leases(tmp_path, expires=0.2) as leases:
        assert leases.claim("a") is None
        time.sleep(0.3)
        assert leases.claim("a") is not None


def test_a_lease_that_could_not_be_renewed_in_time_is_no_longer_held(tmp_path, monkeypatch):
    with Leases(tmp_path, expires=0.4) as leases:
        lease = leases.claim("a")
        assert lease is not None
        monkeypatch.setattr(leases, "rewrite", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
        time.sleep(0.6)
        assert not lease.is_held
        monkeypatch.undo()


def test_a_finished_lease_leaves_no_file_whatever_came_before(tmp_path):
    with Leases(tmp_path, expires=600) as first, Leases(tmp_path, expires=600) as second:
        first.claim("a").release()
        second.claim("a").release()
        lease = first.claim("a")
        assert lease.generation == 2
        lease.finish()
        assert not lease.is_held
        assert list(tmp_path.iterdir()) == []
        lease.finish()
        lease.release()
        assert not lease.renew()
        assert list(tmp_path.iterdir()) == [], "nothing writes it again"
        again = second.claim("a")
        assert again.generation == 0
        assert again.is_held


def test_a_lease_is_held_once_while_it_is_finished_and_claimed_again(tmp_path):
    """A claim in the middle of the removal takes the next generation, and the rest is removed by who finishes last."""
    with Leases(tmp_path, expires=600) as first, Leases(tmp_path, expires=600) as second:
        first.claim("a").release()
        lease = first.claim("a")
        assert lease.generation == 1
        first.path("a", 1).unlink()  # half of ``finish``
        between = second.claim("a")
        assert between.generation == 1
        assert first.claim("a") is None
        lease.finish()
        between.finish()
        assert list(tmp_path.iterdir()) == []


def finish_all(directory, log, names, queue):
    """Works on each name once, as a shard queue does: what is done is known by its file, not by its lease."""
    made = 0
    with Leases(directory) as leases:
        while left := [name for name in names if not (log / name).exists()]:
            for name in left:
                if (lease := leases.claim(name)) is not None:
                    made += storage.create(log / name, b"done", is_durable=False)
                    lease.finish()
    queue.put(made)


def test_processes_that_finish_what_others_claim_do_all_work_once_and_leave_no_lease(tmp_path):
    names, log, leases = [f"shard-{i}" for i in range(40)], tmp_path / "log", tmp_path / "leases"
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=finish_all, args=(leases, log, names, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    assert sum(queue.get(timeout=120) for _ in processes) == len(names)
    for process in processes:
        process.join(60)
    assert sorted(path.name for path in log.iterdir()) == sorted(names)
    assert list(leases.iterdir()) == []
