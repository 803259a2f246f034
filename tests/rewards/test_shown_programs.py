"""Programs with the verdicts that they should get (``../shared/data/cases2/code.jsonl``), at every isolation level."""

import json

import pytest

from oapl_jax.config.reward import RewardConfig
from oapl_jax.rewards import tasks
from oapl_jax.rewards.code import layouts, programs
from oapl_jax.rewards.worker import TaskGrader

pytestmark = pytest.mark.usefixtures("sandboxed")


@pytest.mark.slow
def test_every_program_gets_its_verdict(shared_data, level):
    rows = [json.loads(line) for line in (shared_data / "cases2/code.jsonl").open(encoding="utf-8")]
    assert len(rows) == 43
    reward = RewardConfig.model_validate({"functions": {"code": 1.0}, "isolation": level})
    grader = TaskGrader(tasks.make_setup(reward, ("code",)))
    different = {}
    for row in rows:
        num_tests = len(programs.parse_tests(layouts.read_tests(row["tests"])))
        task = tasks.code_task(reward, json.dumps(row["tests"]), num_tests, row["limits"], program=row["program"])
        (grade,) = grader.grade(task)
        assert grade.level in ("", level)
        if grade.verdict != row["expect"]:
            different[row["id"]] = grade
    grader._judge.close()
    assert different == {}
