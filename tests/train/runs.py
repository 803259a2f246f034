"""Small online runs for the tests of this folder: a toy model, a few windows, a few seconds."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
from safetensors.numpy import load_file

from oapl_jax.build.checks import CHECKS
from oapl_jax.config import config_file
from oapl_jax.config.commands import SftConfig, TrainConfig
from oapl_jax.rollouts.diagnostics import TOKEN_LOGPROBS_FILE

ROOT = pathlib.Path(__file__).parents[2]
BASE = {
    "run": {"steps": 10, "seed": 3, "tracker": None},
    "model": {"path": "set by conftest.py"},
    "data": {"task": "chain", "max_prompt_tokens": 12},
    "sampler": {"group_size": 8, "max_response_tokens": 6, "groups_in_flight": 4, "decode_steps": 3},
    "objective": {"beta2": 0.1},
    "learner": {"batch_rollouts": 32, "learning_rate": 1e-3, "clip_norm": 1.0},
    "window": {"sync_every": 4, "deadline": 120.0},
    "mesh": {"trainer": "fsdp=1"},
    "checkpoint": {"every": 3},
    "evaluation": {"every": 5, "prompts": 8, "samples": 4, "final_samples": 8},
    "logging": {"progress": False},
}


def make_config(run_dir, **sections):
    """``BASE`` in this run directory, with some keys changed: ``make_config(d, mesh={"trainer": "fsdp=8"})``."""
    raw = {name: {**values, **sections.pop(name, {})} for name, values in BASE.items()} | sections
    raw["run"]["dir"] = str(run_dir)
    return config_file.validate(TrainConfig, raw, "tests", CHECKS)


def make_sft_config(run_dir, *words):
    """Supervised training of the toy model that the runs of this folder start from, with some keys changed."""
    words = [
        f"run.dir={run_dir}",
        "run.steps=60",
        f"model.config={ROOT / 'configs/toy_qwen3.json'}",
        "learner.warmup_steps=10",
        "mesh.trainer=fsdp=1",
        "run.tracker=null",
        "logging.progress=false",
        *words,
    ]
    return config_file.load(SftConfig, ROOT / "configs/chain_sft.yaml", words)


def write_config(path, config):
    path.write_text(config_file.to_yaml(config))
    return path


def start(config_path, *overrides, command="train"):
    """``python -m oapl_jax train`` as a user would start it."""
    command = [sys.executable, "-m", "oapl_jax", command, "--config", str(config_path), *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def start_sampler(run_dir, *options):
    """``python -m oapl_jax sample`` on one device."""
    command = [sys.executable, "-m", "oapl_jax", "sample", "--run", str(run_dir), "--mesh", "data=1", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process, timeout=240):
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def signal_after(process, run_dir, step, signal_number=signal.SIGKILL, deadline=240):
    """Sends a signal as soon as metrics of this step are written; False when the run was over before."""
    end = time.monotonic() + deadline
    while process.poll() is None and time.monotonic() < end:
        if any(row["step"] >= step for row in read_lines(run_dir / "metrics.jsonl")):
            process.send_signal(signal_number)
            return True
        time.sleep(0.005)
    return False


def read_lines(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def weights(run_dir):
    return load_file(run_dir / "export" / "model.safetensors")


def assert_same_run(first, second, but=()):
    """Two finished runs are one: weights bit for bit, batches, rollouts that were trained on, metrics but for time and ``but``."""
    for name, tensor in weights(first).items():
        np.testing.assert_array_equal(tensor, weights(second)[name], err_msg=name)
    for name in {"batches.jsonl", "evaluations.jsonl", TOKEN_LOGPROBS_FILE} - {*but}:
        assert read_lines(first / name) == read_lines(second / name), name
    timed = (
        "seconds",
        "tokens_per_second",
        "ready_groups",
        "dropped_groups",
        "slot_use",
        "live_rollouts",
        "preemptions",
        "mfu",
        *but,
    )
    for one, other in zip(read_lines(first / "metrics.jsonl"), read_lines(second / "metrics.jsonl"), strict=True):
        assert {k: v for k, v in one.items() if not k.endswith(timed)} == {
            k: v for k, v in other.items() if not k.endswith(timed)
        }
