"""Trackers show what metrics.jsonl has."""

import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from oapl_jax.config.run import LoggingConfig
from oapl_jax.io import metrics


@pytest.mark.slow
def test_tensorboard_reads_what_was_written_and_no_steps_after_the_resume(tmp_path):
    for resume_step, steps, offset in ((None, range(1, 6), 0.0), (3, range(4, 6), 100.0)):
        with metrics.MetricsWriter(tmp_path, LoggingConfig(), resume_step=resume_step) as writer:
            for step in steps:
                writer.write(step, {"learner/loss": step + offset})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("learner/loss")] == [(1, 1), (2, 2), (3, 3), (4, 104), (5, 105)]


def test_a_wandb_project_without_wandb_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"logging\.wandb_project='demo'.*oapl-jax\[wandb\]"):
        metrics.MetricsWriter(tmp_path, LoggingConfig(wandb_project="demo"))
