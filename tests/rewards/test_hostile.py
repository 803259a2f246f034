"""No program that attacks the grader is accepted or harms its surroundings, and right programs are accepted."""

import json
import pathlib
import tempfile
import threading
import time

import pytest

import hostile_programs as hostile
from oapl_jax.config.reward import RewardConfig
from oapl_jax.rewards import tasks
from oapl_jax.rewards.code.programs import Judge, Settings
from oapl_jax.rewards.code.sandbox import self_test
from oapl_jax.rewards.code.sandbox.isolation import LEVELS
from oapl_jax.rewards.pool import GraderPool
from oapl_jax.types import Verdict

SLOW_PROGRAMS = ("01", "02", "03", "04", "05", "07", "08", "09", "10", "16", "17", "61", "64")
"""Programs that take seconds because they end at a limit, or near it."""


def attacks(shared_data):
    """All shared programs if they are available, then our own."""
    folder = shared_data.parent / "attacks"
    shared = sorted(folder.glob("hostile/*.py")) + sorted(folder.glob("benign/*.py"))
    assert len(shared) >= 55
    return shared + sorted(hostile.OURS.glob("*.py"))


@pytest.fixture
def surroundings():
    # Not tmp_path, whose parents are closed to other uids: what is to be safe has to be in reach.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        pathlib.Path(folder).chmod(0o777)
        around = hostile.Surroundings(pathlib.Path(folder))
        yield around
        around.close()


@pytest.fixture
def make_judge():
    judges = []

    def make(level):
        worker, reason = self_test.try_level(level, Settings(packages=("numpy",)))
        if worker is None:
            pytest.skip(f"this machine has no {level}: {reason}")
        worker.close()
        # Exactly this level: a stronger one would be taken otherwise.
        judges.append(Judge(Settings(level, packages=("numpy",))))
        return judges[-1]

    yield make
    for judge in judges:
        judge.close()


def sweep(judge, surroundings, paths):
    """Judges every program; returns what was not as expected."""
    wrong = []
    for path in paths:
        program = hostile.read_program(path, surroundings.folder)
        judge._sandbox(0), judge._sandbox(1)
        before, cpu = hostile.processes_of(judge), time.process_time()
        got = hostile.judge_program(judge, program, surroundings.secret)
        cpu = time.process_time() - cpu
        found = surroundings.damage()
        if got not in program.expect:
            found.append(f"got {got}, allowed {sorted(program.expect)}")
        if left := hostile.survivors(judge, before):
            found.append(f"processes left: {left}")
        if cpu > hostile.MAX_GRADER_CPU:
            found.append(f"the grader used {cpu:.1f} s of CPU")
        if found:
            wrong.append((program.name, found))
    return wrong


def test_our_hostile_programs_at_the_best_level(make_judge, surroundings):
    paths = sorted(hostile.OURS.glob("*.py"))
    assert len(paths) >= 15
    assert sweep(make_judge("namespaces"), surroundings, paths) == []


def test_the_quick_shared_programs_at_the_best_level(shared_data, make_judge, surroundings):
    paths = [path for path in attacks(shared_data) if not path.name.startswith(SLOW_PROGRAMS)]
    shared = [path for path in paths if path.parent != hostile.OURS]
    assert sweep(make_judge("namespaces"), surroundings, shared) == []


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_all_programs_at_every_level_beside_900_right_ones(shared_data, make_judge, surroundings, monkeypatch, level):
    judge = make_judge(level)
    monkeypatch.setattr(self_test, "LEVELS", (level,))
    reward = RewardConfig.model_validate({"functions": {"code": 1.0}, "isolation": level, "wall_seconds": 60.0})
    right = [
        tasks.code_task(
            reward, json.dumps([{"stdin": f"{n}\n", "stdout": f"{n * n}\n"}]), 1, program="print(int(input()) ** 2)"
        )
        for n in range(300)
    ]
    grades = []
    with GraderPool(1, 1, tasks.make_setup(reward, ("code",))) as pool:
        beside = threading.Thread(target=lambda: grades.extend(pool.grade(right * 3)))
        beside.start()
        assert sweep(judge, surroundings, attacks(shared_data)) == []
        beside.join(300)
    assert judge.level == level
    assert [grade.verdict for grade in grades] == [Verdict.CORRECT] * 900
