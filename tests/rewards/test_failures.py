"""A failure around the graders leads to a retry, or to no verdict and a reason; never to a reward."""

import gc
import json
import math
import os
import pathlib
import resource
import signal
import subprocess
import threading
import time

import pytest

from hostile_programs import pids_of
from oapl_jax.cli import grade as command
from oapl_jax.config.reward import RewardConfig
from oapl_jax.io import console
from oapl_jax.rewards import tasks
from oapl_jax.rewards.code import programs
from oapl_jax.rewards.pool import GraderPool
from oapl_jax.types import Verdict

pytestmark = pytest.mark.usefixtures("sandboxed")

REWARD = RewardConfig.model_validate({"functions": {"code": 1.0}})
QUICK, SLOW = "print(7)", "import time\ntime.sleep(1)\nprint(7)"


def task(program):
    return tasks.code_task(REWARD, '[{"stdin": "", "stdout": "7"}]', 1, program=program)


@pytest.fixture(params=[0, 1], ids=["no retry", "a retry"])
def pool(request):
    """A warm pool of one worker, and the expected result of a failure."""
    with GraderPool(1, request.param, tasks.make_setup(REWARD, ("code",))) as running:
        (grade,) = running.grade([task(QUICK)])
        assert grade.verdict is Verdict.CORRECT, grade
        running.expected = Verdict.CORRECT if request.param else Verdict.INVALID
        yield running


def descendants(pid):
    """The worker's sandbox, outermost process first."""
    found = [pid]
    for parent in found:
        found += map(int, pathlib.Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return found[1:]


def check(pool, grade, reason):
    assert grade.verdict is pool.expected, grade
    if grade.verdict is Verdict.INVALID:
        assert math.isnan(grade.reward)
        assert reason in grade.detail


def during(pool, program, action):
    """Grades a program while something happens to the worker."""
    timer = threading.Timer(0.5, action)
    timer.start()
    (grade,) = pool.grade([task(program)])
    timer.join()
    return grade


def test_a_grader_killed_from_outside(pool):
    check(pool, during(pool, SLOW, lambda: os.kill(pids_of(pool)[0], signal.SIGKILL)), "worker died")


def test_a_sandbox_killed_from_outside(pool):
    outermost = descendants(pids_of(pool)[0])[0]
    check(pool, during(pool, SLOW, lambda: os.kill(outermost, signal.SIGKILL)), "the sandbox's worker")


def test_a_child_killed_from_outside_is_run_once_more(pool):
    before = set(descendants(pids_of(pool)[0]))

    def kill_child():
        for pid in set(descendants(pids_of(pool)[0])) - before:
            os.kill(pid, signal.SIGKILL)

    assert during(pool, SLOW, kill_child).verdict is Verdict.CORRECT


def test_an_exhausted_process_table(pool):
    driver = descendants(pids_of(pool)[0])[-1]
    uid = os.stat(f"/proc/{driver}").st_uid
    if uid == 0:
        pytest.skip("the kernel does not limit the processes of root")
    as_worker = {"user": uid, "group": uid, "extra_groups": []} if os.getuid() == 0 else {}
    subprocess.run(["prlimit", f"--pid={driver}", "--nproc=0:0"], check=True, **as_worker)
    (grade,) = pool.grade([task(QUICK)])
    check(pool, grade, "fork: Resource temporarily unavailable")


def test_no_room_for_a_file(pool):
    """Memory files have a limit as well, although they need no disk."""
    worker = pids_of(pool)[0]
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    timer = threading.Timer(0.3, resource.prlimit, (worker, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2))
    timer.start()
    (grade,) = pool.grade([task(QUICK)])
    timer.join()
    check(pool, grade, "a run could not be started: [Errno 27] File too large")


def test_a_full_disk_for_the_results(tmp_path, capsys):
    row = {"id": 1, "kind": "math", "gold": "1", "response": "1"}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    assert console.run(command.main, [str(tmp_path / "in.jsonl"), "/dev/full"]) == console.ExitCode.FAILED
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.slow
def test_a_grader_that_is_stopped_for_a_while(pool):
    worker = pids_of(pool)[0]

    def stop():
        os.kill(worker, signal.SIGSTOP)
        time.sleep(3.5)
        os.kill(worker, signal.SIGCONT)

    check(pool, during(pool, SLOW, stop), "the machine or its clock jumped by")


@pytest.mark.parametrize("seconds", [-1e6, 1e6])
def test_the_time_of_day_has_no_effect(monkeypatch, seconds):
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + seconds)
    judge = programs.Judge(programs.Settings())
    (result,) = judge.judge(QUICK, [programs.StdioTest("", "7")], programs.Limits(), stop_early=True)
    judge.close()
    assert result.status == "accepted"


def test_a_jump_of_the_steady_clock_is_no_verdict(monkeypatch):
    judge, real, began = programs.Judge(programs.Settings()), time.monotonic, time.monotonic()
    judge.judge(QUICK, [programs.StdioTest("", "7")], programs.Limits(), stop_early=True)
    began = real()
    monkeypatch.setattr(time, "monotonic", lambda: real() + 3600 * (real() > began + 0.5))
    with pytest.raises(programs.SandboxError, match="jumped by 3600"):
        judge.judge(SLOW, [programs.StdioTest("", "7")], programs.Limits(), stop_early=True)
    judge.close()


def test_closed_sandboxes_leave_no_descriptors():
    judge, tests = programs.Judge(programs.Settings()), [programs.StdioTest(str(n), str(n)) for n in range(10)]
    gc.collect()  # or what earlier tests left would be closed meanwhile
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(4):
        assert len(judge.judge("print(input())", tests, programs.Limits(), stop_early=True)) == 10
        judge.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors
