"""A run with several updates a batch and a reference: the same after a resume, and proved by the audit."""

import pytest

from oapl_jax import train
from oapl_jax.rollouts import audit
from oapl_jax.rollouts.diagnostics import TOKEN_LOGPROBS_FILE
from runs import assert_same_run, make_config, read_lines

pytestmark = pytest.mark.slow


def test_two_updates_a_batch_resume_within_a_window(tmp_path):
    sections = {
        "objective": {"name": "grpo", "beta2": 1e-3, "clip_low": 0.01, "clip_high": 0.01, "kl_weight": 0.1},
        "learner": {"updates_per_batch": 2},
        "evaluation": {"every": 0, "prompts": 0},
    }
    for name, steps in (("whole", (4,)), ("parts", (3, 4))):
        for number in steps:
            summary = train.run(
                make_config(tmp_path / name, run={"steps": number}, window={"sync_every": 2}, **sections)
            )
            assert summary["steps"] == number
    # The end of a run is recorded as that of a window is, also where the run goes on later.
    assert_same_run(tmp_path / "whole", tmp_path / "parts", but=(TOKEN_LOGPROBS_FILE,))
    assert "4 steps, 2 windows, 16 groups, 128 rollouts" in audit.audit(tmp_path / "parts")
    rows = read_lines(tmp_path / "whole/metrics.jsonl")
    assert 0 < rows[1]["learner/reference_kl"] < rows[4]["learner/reference_kl"]
    assert rows[1]["learner/log_ratio_abs"] > 1e-4, "the second update of a step has left the sampler"
