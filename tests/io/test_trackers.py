"""Trackers show what metrics.jsonl has, the config, and of a window histograms and samples; no network."""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from oapl_jax.config.run import RunConfig
from oapl_jax.io import metrics, trackers
from oapl_jax.io.trackers import Distributions, Sample

SETTINGS = {"mode": "online", "learner": {"learning_rate": 0.5, "schedule": None}, "window": {"sync_every": 4}}
SHOWN = Distributions(
    {"rollouts/reward": np.array([0.0, 1.0, 1.0, 0.25])}, [Sample("1+1=\n<b>?", "2\x1b[2J", "correct", 1.0)]
)

# A run that is resumed after its third step, in two processes as it would be.
PROGRAM = f"""
import sys
from numpy import array
from oapl_jax.config.run import RunConfig
from oapl_jax.io import trackers
from oapl_jax.io.trackers import Distributions, Sample
directory, library, first = sys.argv[1], sys.argv[2], int(sys.argv[3])
from oapl_jax.io.storage import shared_path
config = RunConfig(dir=directory, steps=9, tracker=library, project="demo")
tracker = trackers.start(shared_path(directory), config, first, {SETTINGS!r})
for step in range(first, first + 3):
    tracker.write(step, {{"learner/loss": step / 4}}, {SHOWN!r} if step == 2 else None)
tracker.flush()
tracker.close()
"""


def track(run_dir, library, **environment):
    """Steps 0 to 2, and then 3 to 5 of a resumed run."""
    run_dir.mkdir()
    for first in (0, 3):
        command = [sys.executable, "-c", PROGRAM, str(run_dir), library, str(first)]
        offline = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, env={**os.environ, **offline, **environment}, check=True, timeout=300)
    return (run_dir / trackers.ID_FILE).read_text()


@pytest.mark.slow
def test_tensorboard_reads_what_was_written_and_no_steps_after_the_resume(tmp_path):
    config = RunConfig(dir=str(tmp_path), steps=9)
    for resume_step, steps, offset in ((-1, range(1, 6), 0.0), (3, range(4, 6), 100.0)):
        tracker = trackers.start(tmp_path, config, resume_step + 1, SETTINGS)
        with metrics.MetricsWriter(tmp_path, tracker, resume_step=resume_step) as writer:
            for step in steps:
                writer.write(step, {"learner/loss": step + offset}, SHOWN if step == 4 else None)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("learner/loss")] == [(1, 1), (2, 2), (3, 3), (4, 104), (5, 105)]
    (histogram,) = events.Histograms("rollouts/reward_histogram")
    assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.sum) == (4, 4, 2.25)
    texts = events.Tensors("rollouts/samples/text_summary")
    assert {(text.step, text.tensor_proto.string_val[0].decode()) for text in texts} == {
        (4, "**correct, reward 1**\n\n    1+1=\n    <b>?\n\n**response**\n\n    2\\x1b[2J\n")
    }
    hyperparameters = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    for word in (b"learner.learning_rate", b"window.sync_every", b"mode", b"online"):
        assert word in hyperparameters


def records(path):
    """Of an offline file of W&B: seven bytes, then blocks of 32 KiB with pieces of records, each behind a header."""
    from wandb.proto import wandb_internal_pb2

    content, offset, whole = path.read_bytes(), 7, b""
    while offset + 7 <= len(content):
        if (left := 2**15 - offset % 2**15) < 7:
            offset += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, offset)
        whole += content[offset + 7 : offset + 7 + size]
        offset += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


@pytest.mark.slow
def test_weights_and_biases_go_on_with_the_run_offline(tmp_path):
    pytest.importorskip("wandb")
    run_id = track(tmp_path / "run", "wandb", WANDB_MODE="offline", WANDB_SILENT="true")
    rows, configs = [], []
    for path in sorted((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")):
        for record in records(path):
            if record.HasField("history"):
                rows.append({"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
            elif record.HasField("run"):
                assert (record.run.project, record.run.run_id) == ("demo", run_id)
                configs.append({item.key: json.loads(item.value_json) for item in record.run.config.update})
    assert len(configs) == 2, "a file for each start"
    assert sorted((row["step"], row["learner/loss"]) for row in rows) == [(step, step / 4) for step in range(6)]
    (shown,) = (row for row in rows if "rollouts/reward_histogram/values" in row)
    assert shown["step"] == 2
    assert sum(shown["rollouts/reward_histogram/values"]) == 4
    assert (shown["rollouts/samples/_type"], shown["rollouts/samples/nrows"]) == ("table-file", 1)
    assert configs[0]["learner"] == SETTINGS["learner"]


@pytest.mark.slow
def test_trackio_goes_on_with_the_run_in_its_local_files(tmp_path):
    pytest.importorskip("trackio")
    run_id = track(tmp_path / "run", "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    program = """
import json
from trackio import api
from trackio.sqlite_storage import SQLiteStorage
(run,) = api.Api().runs("demo")
print(json.dumps([run.name, run.config, SQLiteStorage.get_logs("demo", run.name, run_id=run.id)], default=str))
"""
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300)
    name, config, rows = json.loads(done.stdout.splitlines()[-1])
    assert name == f"run-{run_id}"
    assert config["learner"] == SETTINGS["learner"]
    assert [(row["step"], row["learner/loss"]) for row in rows] == [(step, step / 4) for step in range(6)]
    assert sum(rows[2]["rollouts/reward_histogram"]["values"]) == 4
    assert rows[2]["rollouts/samples"]["_value"][0]["response"] == "2\x1b[2J"


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    config = RunConfig(dir=str(tmp_path), steps=9, tracker=library)
    with pytest.raises(ValueError, match=rf"run\.tracker={library}.*oapl-jax\[{library}\]"):
        trackers.start(tmp_path, config, 0, {})


def test_no_tracker_is_none(tmp_path):
    assert trackers.start(tmp_path, RunConfig(dir=str(tmp_path), steps=9, tracker=None), 0, {}) is None
    assert not list(tmp_path.iterdir())
