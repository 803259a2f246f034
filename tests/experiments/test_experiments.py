"""The program of experiments: a whole grid in small, started twice, and a run that fails."""

import os
import pathlib
import subprocess
import sys

import pytest
import yaml

from oapl_jax.rollouts.audit import audit

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SMALL = {
    "run.steps": 2,
    "data.max_prompt_tokens": 12,
    "learner.batch_rollouts": 16,
    "sampler.groups_in_flight": 2,
    "evaluation.every": 0,
    "evaluation.samples": 2,
    "evaluation.final_samples": 2,
}
GRID = {
    "title": "small",
    "tasks": {
        "chain": {
            "config": str(CONFIGS / "quickstart.yaml"),
            "settings": SMALL,
            "warm_start": str(CONFIGS / "chain_sft.yaml"),
            "warm_settings": {"run.steps": 3, "learner.warmup_steps": 1, "learner.batch_rollouts": 16},
        }
    },
    "methods": {"oapl": {}, "grpo": {"objective": {"name": "grpo"}}},
    "searches": {"rates": {"task": "chain", "method": "oapl", "lag": 2, "values": {"learner.learning_rate": [1e-4]}}},
    "arms": {
        "ours": {"task": "chain", "method": "oapl", "lag": 2, "search": "rates"},
        "theirs": {"task": "chain", "method": "grpo", "lag": 1, "sampler": ["--mesh", "data=1"]},
    },
    "pairs": [[0, 3]],
    "search_prompts": 2,
    "test_prompts": 3,
    "claims": [
        {
            "text": "A",
            "source": "B",
            "left": {"arm": "ours"},
            "right": {"arm": "theirs"},
            "metrics": ["pass@1", "entropy"],
        }
    ],
    "figures": {
        "curves": {"title": "curves", "kind": "curve", "arms": ["ours", "theirs"]},
        "tail": {"title": "tail", "kind": "pass_at_k", "arms": ["ours"]},
    },
}


def run(grid: pathlib.Path, out: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments", str(grid), "--out", str(out), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=550)


@pytest.mark.slow
def test_a_grid_is_trained_reported_and_not_trained_again(tmp_path):
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    grid.write_text(yaml.safe_dump(GRID))
    empty = run(grid, out, "--report")
    assert empty.returncode == 2
    assert "nothing has been trained" in empty.stderr

    words = "--processes", "1", "learner.clip_norm=0.5"  # in the order of the Makefile
    first = run(grid, out, *words)
    assert first.returncode == 0, first.stderr
    assert "[2/2] arms/" in first.stdout
    text = (out / "results.md").read_text()
    assert "| A (B): `ours` final above `theirs` final | **not resolvable** | pass@1 |" in text
    assert "learning_rate 0.0001: " in text
    for name in ("curves", "tail"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    (saved,) = (out / "arms/theirs").glob("*/config.yaml")
    theirs = yaml.safe_load(saved.read_text())
    assert (theirs["objective"]["name"], theirs["mode"]) == ("grpo", "detached")
    assert theirs["learner"]["clip_norm"] == 0.5
    assert audit(saved.parent).startswith("2 steps, 2 windows")

    assert not list(out.rglob("checkpoints"))
    written = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")}
    again = run(grid, out, *words)
    assert again.returncode == 0, again.stderr
    assert "[1/" not in again.stdout
    assert {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")} == written


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_log(tmp_path):
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    wrong = GRID | {"searches": {}, "arms": {"theirs": GRID["arms"]["theirs"]}, "claims": [], "figures": {}}
    wrong["tasks"] = {"chain": {"config": str(CONFIGS / "quickstart.yaml"), "settings": {"data.max_prompt_tokens": 3}}}
    wrong["tasks"]["chain"]["settings"]["model.warm_start"] = str(tmp_path / "absent.yaml")
    grid.write_text(yaml.safe_dump(wrong))
    ended = run(grid, out)
    assert ended.returncode == 1
    assert "1 of 1 runs failed" in ended.stderr
    log = out / "logs/arms.theirs.warm0-seed3.log"
    assert str(log) in ended.stderr
    assert "absent.yaml" in log.read_text()


@pytest.mark.slow
def test_a_run_whose_sampler_fails_does_not_wait_for_another(tmp_path):
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    arm = GRID["arms"]["theirs"] | {"sampler": ["--engine", "no.such:engine"]}
    grid.write_text(yaml.safe_dump(GRID | {"searches": {}, "arms": {"theirs": arm}, "claims": [], "figures": {}}))
    ended = run(grid, out)
    assert ended.returncode == 1
    assert "no.such" in (out / "logs/arms.theirs.warm0-seed3.log").read_text()
