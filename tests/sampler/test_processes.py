"""A replica whose devices belong to several processes: each of them runs the same scheduler."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from test_engine import make_engine, sample

TESTS = pathlib.Path(__file__).parents[1]
DEADLINE = 300.0


@pytest.mark.slow
def test_two_processes_of_one_replica_draw_what_one_process_draws():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    paths = [str(TESTS), str(TESTS.parent), str(TESTS / "sampler")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "XLA_FLAGS": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "sampler" / "process_session.py"), address, str(number), "2"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=DEADLINE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    expected = [[rollout.token_ids.tolist() for rollout in group] for group in sample(make_engine())]
    for output, _ in outputs:
        assert json.loads(output.splitlines()[-1]) == expected
