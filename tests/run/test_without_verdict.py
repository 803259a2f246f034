"""A run says what it loses to graders that fail."""

import numpy as np

from oapl_jax.run.run import without_verdict
from oapl_jax.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, RolloutGroup, Verdict


def make_group(*grades):
    rollout = Rollout(np.zeros(2, np.int32), np.zeros(2, np.float32), FinishReason.STOP)
    prompt = Prompt("p/0", np.zeros(2, np.int32), "?", "7")
    return RolloutGroup(0, 0, prompt, tuple(GradedRollout(rollout, "", grade, 0.0) for grade in grades), value=0.0)


def test_rollouts_without_a_verdict_are_counted_with_a_reason():
    right, failed = Grade(Verdict.CORRECT, 1.0), Grade(Verdict.INVALID, np.nan, "my.reward raised KeyError: 'x'")
    text = without_verdict([make_group(right, failed), make_group(right, right)])
    assert text == "1 of 4 rollouts have no verdict and are left out (my.reward raised KeyError: 'x')"
    assert without_verdict([make_group(right, right)]) == ""
