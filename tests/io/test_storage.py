"""Shared files behave alike in a folder and in object stores: S3 through s3fs, Google's through gcsfs (``stores.py``)."""

import errno
import os
import threading
import time
import uuid

import pytest

import stores
from oapl_jax.io import storage
from oapl_jax.io.lease import Leases
from oapl_jax.rollouts.log import RolloutLog
from rollouts.groups import bits, group


@pytest.fixture(scope="module")
def s3():
    with stores.s3() as address:
        yield address


@pytest.fixture(scope="module")
def gcs():
    with stores.gcs(stores.Weather()) as address:
        yield address


@pytest.fixture(params=["folder", "s3", "gcs"])
def place(request, tmp_path):
    """An empty place of each kind."""
    if request.param == "folder":
        return storage.shared_path(tmp_path / "run")
    return storage.shared_path(f"{request.getfixturevalue(request.param)}/{uuid.uuid4().hex}")


def test_a_file_is_created_by_one_of_those_who_try(place):
    path, won = place / "a" / "claim", []

    def try_it(number):
        if storage.create(path, b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=try_it, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(won) == 1
    assert storage.read(path) == b"%d" % won[0]
    assert not storage.create(path, b"later")
    assert storage.names(place / "a") == ["claim"], "nothing temporary is left"


def test_replace_read_names_remove_and_move_aside(place):
    assert storage.names(place) == []
    storage.replace(place / "b", b"1")
    storage.replace(place / "b", b"22")
    storage.replace(place / "c" / "d", b"")
    assert storage.read(place / "b") == b"22"
    assert storage.names(place) == ["b", "c"]
    assert storage.exists(place / "c" / "d")
    assert not storage.exists(place / "c" / "e")
    with pytest.raises(FileNotFoundError):
        storage.read(place / "e")
    assert storage.move_aside(place / "b").name == "b.damaged"
    storage.replace(place / "b", b"3")
    assert storage.move_aside(place / "b").name == "b.damaged-2"
    storage.remove(place / "c")
    storage.remove(place / "nothing")
    assert storage.names(place) == ["b.damaged", "b.damaged-2"]


def test_a_folder_is_put_and_got(place, tmp_path):
    local = tmp_path / "made"
    local.mkdir()
    (local / "x").write_bytes(b"x" * 1000)
    (local / "y").write_bytes(b"y")
    storage.replace(place / "anything", b"")
    if storage.is_local(place):
        local.rename(place / "to")
    else:
        storage.put_folder(local, place / "to")
    got = storage.get_folder(place / "to", ["x", "y"], tmp_path / "copy")
    assert (got / "x").read_bytes() == b"x" * 1000
    assert (got / "y").read_bytes() == b"y"


def test_the_rollout_log_has_each_number_once(place):
    first, second = RolloutLog(place / "rollouts"), RolloutLog(place / "rollouts")
    assert first.create(3, [group(0), group(1)])
    assert not second.create(3, [group(0)]), "another sampler was there before"
    second.append([group(2)])
    first.append([group(3)])
    assert second.parts(0) == [3, 4, 5]
    assert [bits(item) for item in second.read(0)] == [bits(group(i)) for i in range(4)]
    assert first.versions() == [0]


def test_a_lease_is_held_by_one_and_taken_over_when_it_is_silent(place):
    with Leases(place / "leases", expires=60) as first, Leases(place / "leases", expires=3.0) as second:
        held = first.claim("x")
        assert held is not None
        assert second.claim("x") is None
        end = time.monotonic() + 60
        while (taken := second.claim("x")) is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert taken.renew()
        assert not held.renew(), "and its holder knows"


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    path = tmp_path / "run" / "file"
    storage.replace(path, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.replace(path, b"new")
    with pytest.raises(OSError, match="No space left"):
        storage.create(path.with_name("other"), b"new")
    monkeypatch.undo()
    assert storage.read(path) == b"old"
    assert storage.names(path.parent) == ["file"]


def test_without_hard_links_a_file_is_still_created_once(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert storage.create(tmp_path / "x", b"1")
    assert not storage.create(tmp_path / "x", b"2")
    assert storage.names(tmp_path) == ["x"]
    assert storage.read(tmp_path / "x") == b"1"
