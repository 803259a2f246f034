"""What the end of a run prints."""

import pathlib

from oapl_jax.run.summary import table

SUMMARY = {"steps": 2, "rollouts": 16, "seconds": 3.0, "before": {}, "after": {}}


def test_a_run_without_evaluation_has_no_table():
    assert table(SUMMARY, pathlib.Path("r")).strip("\n") == "2 steps, 16 rollouts, 3 s; curves in r/report.html"


def test_a_run_with_evaluations_has_a_row_before_and_after():
    shown = table(SUMMARY | {"before": {"pass@1": 0.25}, "after": {"pass@1": 0.5}}, pathlib.Path("r"))
    assert shown.split()[:5] == ["pass@1", "before", "0.250", "after", "0.500"]
