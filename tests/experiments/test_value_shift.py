"""The experiment with a shifted V*: what it writes is a log whose V* are those of the first one, and the constant."""

import functools

import numpy as np
import pytest

from experiments.value_shift import shift_rewards
from oapl_jax.objectives.oapl import optimal_value
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.values import read_values
from oapl_jax.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, RolloutGroup, Verdict


def test_a_shift_of_the_rewards_is_one_of_v_star(tmp_path):
    rollout = Rollout(np.arange(3, dtype=np.int32), np.full(3, -0.5, np.float32), FinishReason.STOP)
    groups = []
    for index in range(2):
        grades = [Grade(Verdict.CORRECT, 1.0) if i <= index else Grade(Verdict.WRONG, 0.0) for i in range(4)]
        prompt = Prompt(f"p/{index}", np.arange(2, dtype=np.int32), "?", "7")
        graded = tuple(GradedRollout(rollout, "", grade, advantage=0.0) for grade in grades)
        groups.append(RolloutGroup(index, 0, prompt, graded, value=0.0))
    RolloutLog(tmp_path / "log/rollouts").append(groups)
    shift_rewards(tmp_path / "log", tmp_path / "shifted", -0.3)
    before, after = (
        read_values(tmp_path / name, functools.partial(optimal_value, beta1=1.0)) for name in ("log", "shifted")
    )
    assert before.keys() == after.keys() == {"p/0", "p/1"}
    assert [after[name] - before[name] for name in before] == pytest.approx([-0.3, -0.3], abs=1e-6)


def test_a_matrix_of_four_bits_is_rounded_to_sevenths_of_the_largest_number_of_a_row():
    torch = pytest.importorskip("torch")
    from experiments.rounded import rounded

    matrix = torch.cat([torch.linspace(-2.0, 0.9, 100)[None], torch.zeros(1, 100)])
    found = rounded(matrix, 4)
    steps = found[0] / (2.0 / 7)
    torch.testing.assert_close(steps, steps.round())
    assert (float(steps.min()), float(steps.max())) == pytest.approx((-7.0, 3.0))
    assert float((found - matrix).abs().max()) <= 1.0 / 7 + 1e-6
    assert not found[1].any()
