"""Each benchmark that needs no peer runs at its smallest, and prints one JSON object last."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

COMMANDS = {
    "train_step": "--contenders step unshared packed --repeats 1",
    "sampler": "--contenders ours --workloads uniform --repeats 1",
    "overlap": "--steps 4 --window 2 --repeats 1",
    "sync": "--sizes 0.2B --repeats 1",
    "rewards": "--seconds 0.2 --verdicts 20",
    "report": "--steps 200 --rollouts 2000",
    "memory": "--steps 50 --mode online",
    "gpu_train_step": "--models tiny --lengths 64 --batch-tokens 256 --micro-batch-tokens 128 --steps 1 --repeats 1"
    " --peak-tflops 0.1 --contenders ours",
    "gpu_sampler": "--models tiny --rows 8 --prompt-tokens 16 --new-tokens 16 --short 8 --repeats 1 --bandwidth-gbs 10"
    " --contenders xla dense",
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_runs(name):
    command = [sys.executable, f"benchmarks/{name}.py", "--json", *COMMANDS[name].split()]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"PYTHONPATH": "."}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,  # without the devices of these tests
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith("{"))
    result = json.loads("\n".join(lines[start:]))
    assert result
    for case in result.get("cases", ()):  # of gpu_*.py, which go on where a contender fails
        assert all(case[contender] for contender in command[command.index("--contenders") + 1 :]), done.stdout
