"""The wheel, as someone gets it who has no checkout."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def run(*words, cwd, env=None):
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_quickstart_runs_from_the_wheel_in_an_empty_environment_and_an_empty_folder(tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("oapl_jax-*.whl")
    shipped = {f"oapl_jax/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*") if path.is_file()}
    assert shipped <= set(zipfile.ZipFile(wheel).namelist())

    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    run(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    pip = (environment / "bin/python", "-m", "pip", "install", "-q", "-c", ROOT / "requirements.txt")
    run(*pip, wheel, cwd=tmp_path)
    words = ["run.steps=4", "window.sync_every=2", "evaluation.every=0", "evaluation.final_samples=2"]
    alone = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "XLA_FLAGS")}
    printed = run(environment / "bin/oapl-jax", "train", "--config", "quickstart", *words, cwd=empty, env=alone)
    assert "step   4/4" in printed or "step 4/4" in printed
    assert (empty / "runs/quickstart/export/model.safetensors").exists()
    assert (empty / "runs/chain_sft/export").is_dir(), "the warm start is made from the wheel's own config"
    assert ROOT.as_posix() not in (empty / "runs/quickstart/config.yaml").read_text()
