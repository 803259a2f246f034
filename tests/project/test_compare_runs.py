"""benchmarks/compare_runs.py finds one bit of difference between two runs, and passes over what may differ."""

import json
import pathlib
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

PROGRAM = pathlib.Path(__file__).parents[2] / "benchmarks/compare_runs.py"
LINE = {"learner/loss": 0.1, "rollouts/reward": 0.0, "evaluation/pass@1": None}
TIMES = ("learner/seconds", "learner/tokens_per_second", "learner/mfu", "sampler/rows", "window/ready_groups")


@pytest.fixture
def runs(tmp_path):
    """Two runs that are equal but for what may differ."""
    for name, number in (("old", 1.0), ("new", 2.0)):
        (tmp_path / name / "export").mkdir(parents=True)
        rows = [{"step": step, **LINE, **dict.fromkeys(TIMES, number)} for step in range(3)]
        write_metrics(tmp_path / name, rows)
        weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float16)}
        save_file(weights, tmp_path / name / "export/model.safetensors", {"format": name})
    return tmp_path / "old", tmp_path / "new"


def write_metrics(run, rows):
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_line(run, number, **values):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[number] |= {name.replace("__", "/"): value for name, value in values.items()}
    write_metrics(run, rows)


def change_weights(run, **tensors):
    path = run / "export/model.safetensors"
    save_file(load_file(path) | tensors, path)


def compare(runs, *options):
    done = subprocess.run([sys.executable, PROGRAM, *runs, *options], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_equal_runs_are_equal_whatever_their_times(runs):
    code, output = compare(runs)
    assert code == 0
    assert "3 lines; 4 metrics compared bit for bit, 5 not compared: learner/mfu, learner/seconds," in output
    assert "export: 2 tensors compared by SHA-256\nequal\n" in output


def drop_line(run):
    path = run / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


DAMAGES = {
    "line 2, step 1, learner/loss: 0.1 -> 0.10000000000000002": lambda run: change_line(
        run, 1, learner__loss=float(np.nextafter(0.1, 1))
    ),
    "line 3, step 2, rollouts/reward: 0.0 -> -0.0": lambda run: change_line(run, 2, rollouts__reward=-0.0),
    "line 1, step 0, evaluation/pass@1: None -> 0.5": lambda run: change_line(run, 0, **{"evaluation__pass@1": 0.5}),
    "line 1, step 0, learner/new: absent -> 1": lambda run: change_line(run, 0, learner__new=1),
    "metrics.jsonl has 3 lines -> 2": drop_line,
    "export, a: F32 [2, 3] sha256": lambda run: change_weights(run, a=np.full((2, 3), 1e-45, np.float32)),
    "export, b: F16 [2] sha256": lambda run: change_weights(run, b=np.ones(2, np.float16).view(np.int16)),
    "export, c: absent -> F32 [1] sha256": lambda run: change_weights(run, c=np.zeros(1, np.float32)),
    "export, a: F32 [2, 3] sha256 ": lambda run: shutil.rmtree(run / "export"),
}


@pytest.mark.parametrize("difference", DAMAGES)
def test_one_difference_is_found(runs, difference):
    DAMAGES[difference](runs[1])
    code, output = compare(runs)
    assert code == 1
    assert difference in output


def test_json_has_every_difference(runs):
    write_metrics(runs[1], [{"step": step} for step in range(3)])
    assert "... and" not in compare(runs)[1]
    code, output = compare(runs, "--json")
    assert code == 1
    assert len(json.loads(output)["differences"]) == 3 * len(LINE)


def test_a_renamed_metric_is_compared_under_its_new_name(runs):
    program = runpy.run_path(str(PROGRAM))
    rows = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    write_metrics(runs[1], [{name.replace("loss", "cost"): value for name, value in row.items()} for row in rows])
    assert program["compare"](*runs)["differences"]
    program["RENAMED"]["learner/loss"] = "learner/cost"
    assert not program["compare"](*runs)["differences"]


def test_a_folder_that_is_no_run_is_named(runs, tmp_path):
    code, output = compare([runs[0], tmp_path])
    assert (code, f"{tmp_path} has no metrics.jsonl" in output) == (2, True)
