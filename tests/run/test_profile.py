"""Traces of learner steps."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from oapl_jax.run.profile import Profiler, traced_as


@traced_as("train")
def work():
    return jax.block_until_ready(jnp.arange(10).sum())


def traces(run_dir):
    return sorted(run_dir.glob("profile/plugins/profile/*/*.trace.json.gz"))


def test_the_trace_has_the_chosen_steps_and_their_parts(tmp_path):
    notes = []
    profiler = Profiler(tmp_path, (2, 3), notes.append)
    for step in range(1, 6):
        with profiler.step(step):
            work()
    profiler.close()
    (trace,) = traces(tmp_path)
    assert list(trace.parent.glob("*.xplane.pb"))
    assert notes == [f"trace of learner steps: {tmp_path / 'profile'}"]
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert [event["args"]["step_num"] for event in events if event.get("name") == "learner_step"] == ["2", "3"]
    assert len([event for event in events if event.get("name") == "train"]) == 2


def test_a_run_that_fails_within_the_steps_leaves_its_trace(tmp_path):
    profiler = Profiler(tmp_path, (1, 9), lambda text: None)
    with pytest.raises(RuntimeError), profiler.step(1):
        raise RuntimeError
    profiler.close()
    assert len(traces(tmp_path)) == 1


def test_without_steps_there_is_no_trace(tmp_path):
    profiler = Profiler(tmp_path, None, lambda text: None)
    with profiler.step(1):
        work()
    profiler.close()
    assert not list(tmp_path.iterdir())
