"""Verdicts from paired differences, and what they are computed from."""

import json

import numpy as np
import pytest

from experiments import claims, records, runner
from experiments.claims import Difference
from experiments.grid import Claim, Run, Side
from oapl_jax.io.non_finite import check_finite
from oapl_jax.types import RunError


def difference(*values: float) -> Difference:
    return Difference("pass@1", (0.0, 0.0), (0.0, 0.0), values)


def record(*pass_at_1: float, entropies: tuple[float, ...] = (1.0,)) -> records.Record:
    steps = np.arange(len(pass_at_1)) * 10
    return records.Record(
        steps, steps * 8, [np.array([value]) for value in pass_at_1], np.array(entropies), np.zeros(0)
    )


def test_the_interval_is_students_over_the_pairs():
    low, high = difference(0.1, 0.2, 0.3).interval
    half = 4.302653 * 0.1 / np.sqrt(3)  # t of 2 degrees of freedom at 97.5 %, and the standard error
    assert (low, high) == pytest.approx((0.2 - half, 0.2 + half), rel=1e-5)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.2, 0.21, 0.22), "reproduced"),
        ((-0.2, -0.21, -0.22), "not reproduced"),
        ((0.1, 0.2, 0.3), "not resolvable"),  # the same sign, but the interval holds 0
        ((0.01, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, -0.01), "not resolvable"),  # the interval leaves 0 out, the signs differ
        ((0.4,), "not resolvable"),  # one pair has no interval
    ],
)
def test_a_verdict_wants_the_sign_in_every_pair_and_an_interval_without_0(values, verdict):
    assert difference(*values).verdict == verdict


def test_a_claim_over_several_metrics():
    up, down, open_ = difference(0.2, 0.21, 0.22), difference(-0.2, -0.21, -0.22), difference(0.1, -0.1, 0.1)
    assert claims.verdict([up, up]) == "reproduced"
    assert claims.verdict([up, open_]) == "partly"
    assert claims.verdict([open_, open_]) == "not resolvable"
    assert claims.verdict([up, down]) == "not reproduced"


def test_runs_are_compared_pair_by_pair_and_only_where_both_arms_have_them():
    found = {
        "a": {(0, 0): record(0.1, 0.5, 0.4), (1, 1): record(0.2, 0.6, 0.7), (2, 2): record(0.0, 0.9, 0.9)},
        "b": {(1, 1): record(0.2, 0.3, 0.5), (0, 0): record(0.1, 0.1, 0.1)},
    }
    claim = Claim(text="", source="", left=Side(arm="a", at="best"), right=Side(arm="b"), metrics=("pass@1",))
    (item,) = claims.examine(claim, found)
    assert item.differences == pytest.approx((0.4, 0.2))
    assert item.left[0] == pytest.approx(0.6)
    absent = claim.model_copy(update={"right": Side(arm="c")})
    assert claims.examine(absent, found) == []


def test_the_moments_of_a_run():
    run = record(0.1, 0.9, 0.2, 0.3, 0.5, 0.4, 0.6)  # evaluated at steps 0, 10, ..., 60
    expected = {"start": 0.1, "middle": 0.3, "third": 0.2, "final": 0.6, "best": 0.9}
    assert {moment: run.value("pass@1", moment) for moment in expected} == pytest.approx(expected)
    entropy = record(0.0, entropies=tuple(float(i) for i in range(100)))
    assert (entropy.value("entropy", "start"), entropy.value("entropy", "final")) == (4.5, 94.5)
    with pytest.raises(ValueError, match="entropy has start, final"):
        entropy.value("entropy", "best")


def test_a_record_is_of_some_prompts_of_the_files_of_a_run(tmp_path):
    evaluations = [
        {"step": 0, "prompts": ["a", "b", "c"], "graded": [4, 4, 4], "correct": [4, 0, 1]},
        {"step": 5, "prompts": ["a", "b", "c"], "graded": [4, 4, 4], "correct": [0, 2, 4]},
    ]
    metrics = [
        {
            "step": step,
            "learner/sequence_entropy": step / 10,
            "learner/log_ratio_abs": step / 100,
            "window/lag": step % 2,
        }
        for step in range(1, 6)
    ]
    for name, lines in (("evaluations.jsonl", evaluations), ("metrics.jsonl", metrics)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = records.read(tmp_path, 16, slice(1, 3))
    assert run.rollouts.tolist() == [0, 80]
    assert run.curve("pass@1") == pytest.approx([1 / 8, 3 / 4])
    assert run.curve("pass@2") == pytest.approx([1 / 4, (5 / 6 + 1) / 2])  # 1 - C(n-c, 2) / C(n, 2)
    assert np.isnan(run.curve("pass@8")).all()
    assert run.entropies.tolist() == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert run.mismatches.tolist() == [0.02, 0.04]


def test_a_loss_that_is_not_finite_is_a_result_and_another_failure_is_none(tmp_path):
    run = Run("arms/a", {})
    assert not runner.is_over(run, tmp_path)
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs/arms.a.log"
    log.write_text("the disk: no space left")
    assert not runner.is_over(run, tmp_path)
    with pytest.raises(RunError) as raised:
        check_finite(7, {"learner/loss": float("nan")}, ["learner/loss"])
    log.write_text(f"step 6\nerror: {raised.value}\n")
    assert runner.is_over(run, tmp_path)
