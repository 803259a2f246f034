"""A report of a run with damaged or unusual files, and names that mean something to a plot or a spreadsheet."""

import csv
import json

import numpy as np
import pytest

from oapl_jax.cli import evaluate
from oapl_jax.evaluation import tables
from oapl_jax.io import console
from oapl_jax.report import report
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, RolloutGroup, Verdict
from test_report import make_group, make_run, shown


def damage(path):
    """A file whose middle is something else."""
    content = path.read_bytes()
    path.write_bytes(content[:40] + b"\0" * 40 + content[80:])


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def link_elsewhere(path):
    path.unlink(missing_ok=True)
    path.symlink_to(path.parent / "no" / "such" / "file")


def test_a_report_is_written_whatever_lies_there(tmp_path, capsys):
    run = make_run(tmp_path / "demo", steps=3)
    RolloutLog(run / "rollouts").append([make_group(0, 5, "whole \x1b[2J")])
    cut(run / "rollouts/000000/part-000000.parquet")
    damage(run / "rollouts/000003/part-000000.parquet")
    for name in ("report.html", "curves.png"):
        link_elsewhere(run / name)
    found = shown(report.write_report(run).parent)
    problem = "rollouts/000000/part-000000.parquet: is not a readable Parquet file"
    assert problem in found["damaged"][0]
    assert problem in capsys.readouterr().err
    assert [group["rollouts"][0]["text"] for group in found["groups"]] == [r"whole \x1b[2J 0"]
    assert not (run / "report.html").is_symlink()
    assert not (run / "no").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "[1]"),
        ("summary.json", '{"after": {"pass@x": 1}}'),
        ("metrics.jsonl", '{"step": 1, "rollouts/reward": "high"}\n{"step": 2}\n'),
        ("evaluations.jsonl", '{"step": 1, "prompts": ["a"], "graded": [4], "correct": [5]}\n'),
        ("evaluations.jsonl", '{"step": 1, "prompts": ["a"], "graded": [4, 4], "correct": [1]}\n'),
    ],
)
def test_a_damaged_record_is_one_line(tmp_path, capsys, name, content):
    run = make_run(tmp_path / "demo", steps=3)
    (run / name).write_text(content)
    assert console.run(lambda argv: print(report.write_report(run)), []) == console.ExitCode.FAILED
    message = capsys.readouterr().err
    assert message.startswith(f"error: {run}: no report was written: ")
    assert message.count("\n") == 1


NAMES = ["$\\frac{1$", "=1+1", "+1", "-2+3", "@SUM(1)", "\tx", "\x1b[31mred", "_hidden", "ünïcode 你好", "x" * 500]


def test_any_name_may_be_drawn_and_no_cell_is_a_formula(tmp_path, recwarn):
    rollout = Rollout(np.zeros(2, np.int32), np.full(2, -0.5, np.float32), FinishReason.STOP)
    graded = (
        GradedRollout(rollout, "x", Grade(Verdict.CORRECT, 1.0)),
        GradedRollout(rollout, "y", Grade(Verdict.WRONG, 0.0)),
    )
    log = RolloutLog(tmp_path / "log")
    prompts = [Prompt(f"{name}/0", np.zeros(1, np.int32), "?", "") for name in NAMES]
    log.append([RolloutGroup(i, 0, prompt, graded, 0.0) for i, prompt in enumerate(prompts)])
    out = tmp_path / "out"
    evaluate.report([("=cmd|' /C calc'!A0", log.directory), ("b", log.directory)], out)
    assert (out / "passk.png").stat().st_size > 1000
    with (out / tables.CSV_FILE).open(newline="") as file:
        rows = list(csv.reader(file, quoting=csv.QUOTE_NONNUMERIC))[1:]
    assert all(not tables.FORMULA.match(cell) for row in rows for cell in row[:4])
    assert {type(cell) for row in rows for cell in row[4:]} == {float}, "numbers stay numbers"
    assert {row[1] for row in rows} >= {"'=1+1", "'\tx", "\\x1b[31mred"}
    json.loads((out / tables.JSON_FILE).read_text())
