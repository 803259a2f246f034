"""The processes of a rendered JobSet on this machine: killed, stopped, started again by its rules, audited."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_two_trainers_and_two_samplers_end_their_run_although_one_of_each_is_stopped(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = ["bash", str(ROOT / "launch/local_sim.sh"), "--out", str(tmp_path / "sim")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sampler 0 gets SIGKILL" in done.stdout
    assert "sampler 0 ended with 137: Count" in done.stdout
    assert re.search(r"trainer \d ended with 42: Count", done.stdout)
    assert re.search(r"12 steps, 3 windows, 48 groups, 384 rollouts: all as recorded", done.stdout)
