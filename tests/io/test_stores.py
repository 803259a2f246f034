"""The store that the tests run against behaves as it says, and what a run relies on holds in bad weather."""

import concurrent.futures
import http.client
import os
import threading
import time
import uuid

import pytest

import stores
from oapl_jax.distributed.team import Team
from oapl_jax.io import json_lines, storage
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.weights.checkpoint_store import CheckpointStore
from rollouts.groups import bits, group


@pytest.fixture(scope="module")
def gcs():
    weather = stores.Weather()
    with stores.gcs(weather) as address:
        yield address, weather


@pytest.fixture
def place(gcs):
    """An empty place, in good weather at first."""
    address, weather = gcs
    vars(weather).update(vars(stores.Weather()))
    yield storage.shared_path(f"{address}/{uuid.uuid4().hex}"), weather
    vars(weather).update(vars(stores.Weather()))


def test_of_fifty_concurrent_creates_one_wins(place):
    path, start = place[0] / "claim", threading.Barrier(50)

    def create(number):
        start.wait(60)
        return storage.create(path, b"%d" % number)

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        won = list(pool.map(create, range(50)))
    assert won.count(True) == 1
    assert storage.read(path) == b"%d" % won.index(True)


def test_a_store_without_preconditions_is_refused(place):
    folder, weather = place
    storage.check_creates_once(folder)
    weather.preconditions = False
    with pytest.raises(ValueError, match="creates a file that is there already"):
        storage.check_creates_once(folder)
    assert storage.names(folder) == [], "the probe is removed"


def test_a_store_that_must_not_be_written_is_refused(place):
    folder, weather = place
    weather.rates = {"403": 1.0}
    with pytest.raises(ValueError, match=r"cannot be written and read: .*Forbidden"):
        storage.check_creates_once(folder)


def ask(path):
    host = os.environ["STORAGE_EMULATOR_HOST"].removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=20)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize("status", ["429", "503"])
def test_the_proxy_answers_with_errors(place, status):
    path, weather = place
    storage.replace(path / "x", b"1")
    weather.rates = {status: 1.0}
    assert ask("/storage/v1/b/runs")[0] == int(status)


@pytest.mark.parametrize("fault", ["cut before", "cut after", "cut answer"])
def test_the_proxy_cuts_connections(place, fault):
    place[1].rates = {fault: 1.0}
    with pytest.raises((http.client.HTTPException, OSError)):
        ask("/storage/v1/b/runs")


def test_the_proxy_lists_late_and_reads_at_once(place):
    folder, weather = place
    storage.replace(folder / "a", b"1")
    weather.listing_lag = 2.0
    assert storage.names(folder) == ["a"]
    storage.replace(folder / "b", b"2")
    assert storage.names(folder) == ["a"]
    assert storage.read(folder / "b") == b"2"
    time.sleep(2.1)
    assert storage.names(folder) == ["a", "b"]


@pytest.mark.slow
def test_a_file_of_lines_in_parts_loses_nothing_and_repeats_nothing(place, monkeypatch):
    folder, weather = place
    monkeypatch.setattr(json_lines, "PART_BYTES", 100)
    path, records = folder / "batches.jsonl", [{"step": step, "text": "x" * (step % 7)} for step in range(24)]
    weather.rates, weather.listing_lag = {"503": 0.05, "cut after": 0.05}, 5.0
    lines, _ = json_lines.open_lines(path, lambda step: True)
    for record in records[:18]:
        lines.append(record)
    assert json_lines.read(path) == records[:18]
    again, kept = json_lines.open_lines(path, lambda step: step <= 11)
    assert kept == records[:12]
    assert json_lines.read(path) == records[:12]
    for record in records[12:]:
        again.append(record)
    assert json_lines.read(path) == records
    assert weather.num_faults > 0
    weather.rates, weather.listing_lag = {}, 0.0
    assert len(storage.names(path)) > 5, "no part is rewritten for long"


def test_a_killed_process_leaves_the_first_lines_without_a_gap(place, monkeypatch):
    """``open_lines`` removes lines from the end on, so it may be killed after any of its writes."""
    folder, _ = place
    monkeypatch.setattr(json_lines, "PART_BYTES", 60)
    path, records = folder / "metrics.jsonl", [{"step": step} for step in range(30)]
    lines, _ = json_lines.open_lines(path, lambda step: True)
    for record in records:
        lines.append(record)
    remove, left = storage.remove, [2]

    def killed(path):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        remove(path)

    monkeypatch.setattr(storage, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        json_lines.open_lines(path, lambda step: step < 3)
    found = json_lines.read(path)
    assert 3 < len(found) < 30
    assert found == records[: len(found)]


@pytest.mark.slow
def test_a_group_whose_answer_was_lost_is_in_the_log_once(place):
    folder, weather = place
    log = RolloutLog(folder / "rollouts")
    log.append([group(0)])
    weather.rates = {"cut after": 0.6}
    for i in range(1, 4):
        log.append([group(i)])
    assert weather.num_faults > 0
    weather.rates = {}
    assert [bits(item) for item in log.read(0)] == [bits(group(i)) for i in range(4)]
    assert log.parts(0) == [0, 1, 2, 3]


def test_a_checkpoint_is_there_when_its_marker_is(place, tmp_path):
    folder, _ = place
    store, local = CheckpointStore(folder / "checkpoints"), tmp_path / "100"
    (local / "arrays").mkdir(parents=True)
    (local / "arrays" / "x.0").write_bytes(b"x" * 1000)
    (local / "_METADATA").write_bytes(b"{}")
    store.put(100, local, Team.alone())
    store.put(200, local, Team.alone())
    assert store.steps() == [100, 200]
    store.fetch(100, tmp_path / "copy")
    assert (tmp_path / "copy" / "arrays" / "x.0").read_bytes() == b"x" * 1000
    storage.replace(folder / "checkpoints" / "200" / "arrays" / "x.0", b"torn")
    with pytest.raises(ValueError, match="has 4 bytes, its marker says 1,000"):
        store.fetch(200, tmp_path / "torn")
    assert store.set_aside(200).endswith("200.json.damaged")
    assert store.steps() == [100]
    store.remove(100)
    assert store.steps() == []
