"""The groups of the experiment on offline RL for code: edits of one line, verdicts of the sandbox, and what training reads."""

import json

import pyarrow.parquet as pq
import pytest

from experiments.offline_code import Candidate, Problem, make_groups, one_line_edits, write_groups

PROGRAM = """def largest(values, n):
    # é: columns are counted in bytes
    best = 0
    for i in range(n):
        if values[i] > best and not values[:n] is None:
            best = max(best, values[i] + 0)
    return best"""


def test_an_edit_changes_one_line_and_leaves_a_program():
    edits = one_line_edits(PROGRAM)
    changed = []
    for edit in edits:
        lines = [(old, new) for old, new in zip(PROGRAM.split("\n"), edit.split("\n"), strict=True) if old != new]
        ((_, new),) = lines
        compile(edit, "edit", "exec")
        changed.append(new.strip())
    assert len(set(changed)) == len(changed)
    assert {"best = 1", "best = -1", "best = min(best, values[i] + 0)", "best = max(best, values[i] - 0)"} <= set(
        changed
    )
    assert "if values[i] >= best and not values[:n] is None:" in changed
    assert "if values[i] > best or not values[:n] is None:" in changed
    assert "if values[i] > best and values[:n] is None:" in changed
    assert one_line_edits("def f(x):\n    return x") == []


@pytest.mark.slow
def test_groups_have_a_reference_that_passes_and_wrong_programs(tmp_path):
    tests = json.dumps({"test_list": ["assert largest([3, -5, 4], 3) == 4", "assert largest([], 0) == 0"]})
    problem = Problem("mbpp/601", "Find the largest.", tests, PROGRAM)
    answers = [Candidate(problem, "answer", text) for text in ("I cannot.", f"Here:\n```python\n{PROGRAM}\n```")]
    failing = Problem("mbpp/602", "Find it.", json.dumps({"test_list": ["assert largest([1], 1) == 2"]}), PROGRAM)
    lone = Problem("mbpp/603", "The same.", json.dumps({"test_list": ["assert f(1) == 1"]}), "def f(x):\n    return x")
    (members,) = make_groups([problem, failing, lone], answers, tmp_path)
    found = sorted((member.candidate.origin, member.verdict, member.reward) for member in members)
    assert found == [
        ("answer", "correct", 1.0),
        ("answer", "wrong", -1.0),
        ("edit", "wrong", -0.1),
        ("reference", "correct", 1.0),
    ]
    write_groups(tmp_path / "groups.parquet", [members])
    rows = pq.read_table(tmp_path / "groups.parquet").to_pylist()
    assert [row["precomputed_reward"] for row in rows] == rows[0]["response_rewards"]
    assert {row["prompt"][0]["content"] for row in rows} == {"Find the largest."}
