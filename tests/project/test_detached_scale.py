"""The model of detached samplers counts what the program does, and a store serves no faster than its limits."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import detached_scale as scale

FREE = scale.StoreLimits(1e9, 1e9, 0.0, 1e18)


def test_a_store_serves_requests_at_its_rate_and_a_client_one_after_the_other():
    store = scale.Store(scale.StoreLimits(100, 10, 0.05, 1e9))
    assert store.serial(0.0, 4, 0) == pytest.approx(0.2), "four answers, each after 50 ms"
    assert store.serial(0.0, 196, 0) == pytest.approx(9.8)
    assert store.serial(0.0, 300, 0) == pytest.approx(15.0)
    assert store.serial(0.0, 1, 0) == pytest.approx(5.01), "500 reads were waiting"
    assert store.serial(0.0, 0, 1, bytes_in=10e9) == pytest.approx(10e9 / scale.CLIENT_BYTES_PER_SECOND + 0.05)
    assert store.serial(100.0, 64, 0, at_once=32) == pytest.approx(100.64), (
        "two rounds are faster than the store's rate"
    )
    assert (store.reads, store.writes) == (565, 1)


def test_a_preempted_sampler_delays_no_other():
    """What it fetches when it is back must not stand in the queue before it is there."""
    found = scale.Window(scale.STORES["gs"], scale.DESIGNS["changed"], 1e9, 16).run()
    assert found["preempted_share"] > 0
    shares = [found[f"{name}_share"] for name in ("sampling", "claiming", "preempted")]
    assert sum(shares) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("design", scale.DESIGNS)
def test_where_files_cost_nothing_samplers_sample_all_the_time(design):
    window = scale.Window(FREE, scale.DESIGNS[design], 1.0, 3)
    found = window.run()
    assert len(window.written) == window.num_shards
    assert found["sampling_share"] + found["preempted_share"] == pytest.approx(1.0, abs=0.02)
    assert found["window_hours"] * 3600 == pytest.approx(scale.STEPS * scale.STEP_SECONDS, rel=0.05)


def test_requests_of_a_claim_grow_with_the_samplers_only_without_an_index():
    today, changed = scale.DESIGNS["today"], scale.DESIGNS["changed"]
    assert today.claim(2500, 63, 63) == (3 + 63 + 3 * 63 + 2, 1)
    assert changed.claim(2500, 63, 63) == changed.claim(0, 0, 0) == (3, 1)
